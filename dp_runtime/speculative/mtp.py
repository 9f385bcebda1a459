"""MTP: the multi-token-prediction layer that a Qwen checkpoint has under `mtp.`, used recursively.

layer(fc(cat(norm(embedding), norm(hidden state)))), with the target's embedding and LM head
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.errors import require
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import Rotary
from dp_runtime.models.causal_lm import DecoderLayer, Hidden, PassInputs, PassPlan
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.fp8_config import parse_fp8_experts
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.known_tensors import SKIPPABLE_WHILE_DRAFTING
from dp_runtime.models.lm_head import LmHeadMixin
from dp_runtime.models.model import Model
from dp_runtime.parallel.row_exchange import RowExchange
from dp_runtime.speculative.draft import DraftConfig, concat_normed
from dp_runtime.speculative.mtp_families import FAMILIES
from dp_runtime.weights.fp8_blocks import SCALE_SUFFIX
from dp_runtime.weights.loader import tensor_names
from dp_runtime.weights.source import WeightSource

LAYER = "mtp.layers.0"
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # what config.json may call them


@dataclass(frozen=True, kw_only=True)
class MtpConfig(DraftConfig):
    layer: ModelConfig  # the target's, with the MTP layer as its only one


def read_config(directory: str, target: ModelConfig) -> MtpConfig:
    """Read the first MTP layer of a target; ValueError if it has none."""
    fields = ConfigFields.read(Path(directory) / "config.json")
    family = FAMILIES.get(target.architecture)
    text = fields if family is None else family.find_text(fields)
    count = max(text.integer(name, 0, minimum=0) for name in COUNTS)
    require(
        family is not None and count >= 1, "speculative_draft_model", None,
        f"name the directory of an EAGLE-3 head: {directory} is none of {', '.join(FAMILIES)} with "
        f"{COUNTS[0]} or {COUNTS[1]} >= 1, which would have a draft layer of its own",
    )  # fmt: skip
    assert family is not None
    text.only("mtp_use_dedicated_embeddings", False)
    quantization = fields if "quantization_config" in fields else text
    fp8 = parse_fp8_experts(quantization, [f"{LAYER}.mlp.experts"], family.expert_names)
    layer = family.layer_config(target, _as_stored(directory, fp8))
    return MtpConfig(
        method="mtp",
        directory=directory,
        num_layers=1,
        num_heads=target.num_heads,
        num_kv_heads=target.num_kv_heads,
        head_dim=target.head_dim,
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        aux_hidden_state_layers=(),
        layer=layer,
    )


def _as_stored(directory: str, listed: tuple[bool, ...]) -> tuple[bool, ...]:
    """Ask the files, if there are some, whether the layer's experts are e4m3: lists leave it out.

    listed: what config.json says.
    """
    experts = [name for name in tensor_names(directory) if name.startswith(f"{LAYER}.mlp.experts.")]
    return (any(name.endswith(SCALE_SUFFIX) for name in experts),) if experts else listed


@dataclass(frozen=True, eq=False, kw_only=True)
class Mtp(LmHeadMixin):
    """Reads and returns hidden states *after* the final norm, as Qwen3-Next is trained to."""

    config: MtpConfig
    embedding: Tensor  # [vocab, hidden], the target's
    head: Linear  # the target's, or its first rows
    embedding_norm: RMSNorm
    hidden_norm: RMSNorm
    fc: Linear  # [hidden, 2 * hidden]
    rotary: Rotary
    layer: DecoderLayer
    norm: RMSNorm
    backend: AttentionBackend

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        return () if self.layer.moe_stage is None else (self.layer.moe_stage,)

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Mtp:
        return replace(self, layer=self.layer.with_stage(make))

    def project(self, aux_hidden_states: Tensor) -> Tensor:
        return aux_hidden_states

    def forward(self, inputs: PassInputs, plan: PassPlan, exchange: RowExchange) -> Hidden:
        x = self.fc(concat_normed(inputs, self.embedding, self.embedding_norm, self.hidden_norm))
        cos_sin = self.rotary(inputs.positions, x.dtype)
        x, residual = self.layer(x, None, cos_sin, plan, exchange)
        last = self.norm.add(x, residual)[0]
        return Hidden(last, last)

    def token_ids(self, best: Tensor) -> Tensor:
        return best

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        hidden, size = self.hidden_size, self.dtype.itemsize
        fuse = 5 * own_rows * hidden * size  # embedding, both norms, and their concatenation
        normed = 2 * own_rows * hidden * size + self.norm.activation_bytes(own_rows)
        layer = self.layer.activation_bytes(own_rows, gathered_rows, padded)
        layer += own_rows * (hidden + self.config.head_dim) * size  # its input, cos and sin
        return max(fuse, normed, layer)


class MtpMethod:
    skippable_tensors = SKIPPABLE_WHILE_DRAFTING

    def read_config(self, directory: str, target: ModelConfig) -> MtpConfig:
        return read_config(directory, target)

    def build(
        self,
        config: DraftConfig,
        target: Model,
        weights: WeightSource,
        sharding: RankSharding,
        backend: AttentionBackend,
        moe: MoeKernels,
    ) -> Mtp:
        assert isinstance(config, MtpConfig), config
        hidden, eps = config.hidden_size, config.layer.rms_norm_eps
        family, paged = FAMILIES[config.layer.architecture], backend.layer(0)
        load_norm = family.load_norm
        return Mtp(
            config=config,
            embedding=target.embedding,
            head=target.head.first(config.vocab_size),
            embedding_norm=load_norm(weights, "mtp.pre_fc_norm_embedding", hidden, eps),
            hidden_norm=load_norm(weights, "mtp.pre_fc_norm_hidden", hidden, eps),
            fc=Linear.load(weights, {"mtp.fc": hidden}, 2 * hidden),
            rotary=Rotary.from_config(config.layer.rope, config.head_dim, weights.device),
            layer=family.load_layer(config.layer, weights, LAYER, paged, sharding, moe),
            norm=load_norm(weights, "mtp.norm", hidden, eps),
            backend=backend,
        )


METHOD = MtpMethod()
