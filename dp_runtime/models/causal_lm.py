"""CausalLM: a decoder of pre-norm layers, composed by the architectures from shared layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend, PagedAttention
from dp_runtime.attention.plan import AttentionPlan
from dp_runtime.core.qk_norm_rope import CosSin
from dp_runtime.core.recurrent_metadata import RecurrentPlan
from dp_runtime.errors import require
from dp_runtime.layers.attention import Attention
from dp_runtime.layers.gated_attention import GatedAttention
from dp_runtime.layers.gated_delta_net import GatedDeltaNet
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.mlp import DenseMLP
from dp_runtime.layers.moe import MoeStage
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import Rotary
from dp_runtime.layers.shared_expert import SharedExpertMoe
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.lm_head import LmHeadMixin
from dp_runtime.parallel.row_exchange import RowExchange
from dp_runtime.vision.encoder import VisionEncoder
from dp_runtime.weights.source import WeightSource

HEAD = "lm_head.weight"


def _nothing() -> Tensor:
    return torch.empty(0, 0)


@dataclass(frozen=True, eq=False)
class RowEmbeds:
    """What takes the place of the embeddings of some rows' tokens."""

    rows: Tensor  # [embeds] int64
    values: Tensor  # [embeds, hidden]

    def put(self, x: Tensor) -> None:
        x[self.rows] = self.values.to(x.dtype)


@dataclass(frozen=True, eq=False)
class MaskedEmbeds:
    """The same of rows that only the device knows: a graph is captured for any of them."""

    mask: Tensor  # [rows, 1] bool
    values: Tensor  # [rows, hidden], read where the mask is set

    def put(self, x: Tensor) -> None:
        torch.where(self.mask, self.values, x, out=x)


@dataclass(frozen=True, eq=False)
class PassInputs:
    """A rank's rows for one pass, on the device."""

    token_ids: Tensor  # [rows] int64
    positions: Tensor  # [rows] int64, or [3, rows] of time, height and width
    hidden: Tensor = field(default_factory=_nothing)  # [rows, hidden], for a draft model
    embeds: RowEmbeds | MaskedEmbeds | None = None

    def embedded(self, embedding: Tensor) -> Tensor:
        """Look rows up in an embedding [vocab, hidden] -> [rows, hidden], a new tensor."""
        x = embedding[self.token_ids]
        if self.embeds is not None:
            self.embeds.put(x)
        return x


@dataclass(frozen=True, eq=False)
class PassPlan:
    """What layers need to know of a pass's sequences, each kind of layer its own part."""

    attention: AttentionPlan
    recurrent: RecurrentPlan | None = None  # of a model with layers that have a state


class Hidden(NamedTuple):
    """A forward's result: the inputs of the LM head and of a draft model."""

    last: Tensor  # [rows, hidden], after the final norm
    aux_hidden_states: Tensor  # [rows, layers * hidden] entering those layers; without any, `last`

    def first(self, rows: int) -> Hidden:
        return Hidden(self.last[:rows], self.aux_hidden_states[:rows])


Mixer = Attention | GatedAttention | GatedDeltaNet  # what lets rows of a sequence see others
Mlp = MoeStage | SharedExpertMoe | DenseMLP


@dataclass(frozen=True, eq=False)
class DecoderLayer:
    input_norm: RMSNorm
    mixer: Mixer
    post_attention_norm: RMSNorm
    mlp: Mlp

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None,
        cos_sin: CosSin,
        plan: PassPlan,
        exchange: RowExchange,
    ) -> tuple[Tensor, Tensor]:
        """Return what the layer adds to the residual, and that residual."""
        normed, residual = self.input_norm.add(x, residual)
        normed, residual = self.post_attention_norm.add(self._mix(normed, cos_sin, plan), residual)
        if isinstance(self.mlp, DenseMLP):
            return self.mlp(normed), residual
        return self.mlp(normed, exchange), residual

    def _mix(self, x: Tensor, cos_sin: CosSin, plan: PassPlan) -> Tensor:
        if not isinstance(self.mixer, GatedDeltaNet):
            return self.mixer(x, cos_sin, plan.attention)
        assert plan.recurrent is not None, "a layer with a recurrent state needs its sequences"
        return self.mixer(x, plan.recurrent)

    @property
    def moe_stage(self) -> MoeStage | None:
        match self.mlp:
            case SharedExpertMoe(routed=stage) | (MoeStage() as stage):
                return stage
            case _:
                return None

    def with_stage(self, make: Callable[[MoeStage], MoeStage]) -> DecoderLayer:
        match self.mlp:
            case MoeStage() as stage:
                return replace(self, mlp=make(stage))
            case SharedExpertMoe(routed=stage) as mlp:
                return replace(self, mlp=replace(mlp, routed=make(stage)))
            case _:
                return self

    def activation_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        hidden, mlp = self.mixer.output.activation_bytes(own_rows), self.mlp
        inner = (
            mlp.activation_bytes(own_rows)
            if isinstance(mlp, DenseMLP)
            else mlp.activation_bytes(own_rows, gathered_rows, padded)
        )
        norm = self.input_norm.activation_bytes(own_rows)
        mixed = self.mixer.activation_bytes(own_rows)
        return hidden + max(mixed, hidden + norm, inner)  # the norm of the residual

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        weights: WeightSource,
        prefix: str,
        paged: PagedAttention,
        mlp: Mlp,
    ) -> DecoderLayer:
        hidden, eps = config.hidden_size, config.rms_norm_eps
        return cls(
            RMSNorm.load(weights, f"{prefix}.input_layernorm", hidden, eps),
            Attention.load(config.attention, weights, f"{prefix}.self_attn", paged),
            RMSNorm.load(weights, f"{prefix}.post_attention_layernorm", hidden, eps),
            mlp,
        )


@dataclass(frozen=True, eq=False)
class CausalLM(LmHeadMixin):
    config: ModelConfig
    embedding: Tensor  # [vocab, hidden]
    rotary: Rotary
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    head: Linear
    backend: AttentionBackend
    aux_hidden_state_layers: tuple[int, ...] = ()  # whose inputs a draft model reads
    vision: VisionEncoder | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        return tuple(layer.moe_stage for layer in self.layers if layer.moe_stage is not None)

    @property
    def delta_nets(self) -> tuple[GatedDeltaNet, ...]:
        mixers = (layer.mixer for layer in self.layers)
        return tuple(mixer for mixer in mixers if isinstance(mixer, GatedDeltaNet))

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> CausalLM:
        return replace(self, layers=tuple(layer.with_stage(make) for layer in self.layers))

    def with_aux_hidden_states(self, layers: tuple[int, ...]) -> CausalLM:
        """Copy the model; forwards also return the residual stream entering these layers."""
        assert set(layers) <= set(range(len(self.layers))), f"{layers} of {len(self.layers)} layers"
        return replace(self, aux_hidden_state_layers=layers)

    def forward(self, inputs: PassInputs, plan: PassPlan, exchange: RowExchange) -> Hidden:
        x = inputs.embedded(self.embedding)
        cos_sin = self.rotary(inputs.positions, x.dtype)
        aux_hidden_states = x.new_empty(len(x), len(self.aux_hidden_state_layers), x.shape[1])
        residual: Tensor | None = None
        for index, layer in enumerate(self.layers):
            for place, aux_layer in enumerate(self.aux_hidden_state_layers):
                if aux_layer == index:
                    _copy_sum(x, residual, aux_hidden_states[:, place])
            x, residual = layer(x, residual, cos_sin, plan, exchange)
        last = self.norm.add(x, residual)[0]
        return Hidden(last, aux_hidden_states.flatten(1) if self.aux_hidden_state_layers else last)

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        inputs = 2 + len(self.aux_hidden_state_layers)  # of a layer, and those that are kept
        row = inputs * self.config.hidden_size + self.config.head_dim  # and cos and sin
        return own_rows * row * self.embedding.dtype.itemsize + max(
            layer.activation_bytes(own_rows, gathered_rows, padded) for layer in self.layers
        )

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        weights: WeightSource,
        backend: AttentionBackend,
        mlp: Callable[[int, str], MoeStage | DenseMLP],
    ) -> CausalLM:
        """Load by the names that transformers' decoders share; `mlp(layer, prefix)` is called."""
        sizes = (config.vocab_size, config.hidden_size)
        embedding = weights.load("model.embed_tokens.weight", sizes)
        layers = []
        for layer in range(config.num_layers):
            prefix = f"model.layers.{layer}"
            paged, stage = backend.layer(layer), mlp(layer, prefix)
            layers.append(DecoderLayer.load(config, weights, prefix, paged, stage))
        return cls(
            config,
            embedding,
            Rotary.from_config(config.rope, config.head_dim, weights.device),
            tuple(layers),
            RMSNorm.load(weights, "model.norm", config.hidden_size, config.rms_norm_eps),
            Linear(load_head(config, weights, embedding), None),
            backend,
        )


def load_head(config: ModelConfig, weights: WeightSource, embedding: Tensor) -> Tensor:
    """Load [vocab, hidden]; a tied model may have an equal copy of its embedding, as many do."""
    if not config.tie_word_embeddings:
        return weights.load(HEAD, (config.vocab_size, config.hidden_size))
    require(
        not weights.has(HEAD) or weights.equals(HEAD, embedding),
        "config.json: tie_word_embeddings", True,
        f"the checkpoint's {HEAD} differs from its embedding; set tie_word_embeddings to false",
    )  # fmt: skip
    return embedding


def _copy_sum(x: Tensor, residual: Tensor | None, out: Tensor) -> None:
    """Write x + residual to `out`: layers overwrite both."""
    if residual is None:
        out.copy_(x)
    else:
        torch.add(x, residual, out=out)
