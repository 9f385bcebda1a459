"""EAGLE-3: one dense layer over hidden states of three target layers (arXiv 2503.01840).

The attention reads normed embedding and normed hidden state; the residual is the latter, un-normed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.errors import require
from dp_runtime.layers.attention import Attention
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.mlp import DenseMLP
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import Rotary
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.lm_head import LmHeadMixin
from dp_runtime.models.model import Model
from dp_runtime.parallel.row_exchange import RowExchange
from dp_runtime.speculative.draft import DraftConfig, concat_normed
from dp_runtime.speculative.eagle3_config import EMBEDDING, MAP, Eagle3Config, read_config
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False, kw_only=True)
class Eagle3(LmHeadMixin):
    """Chains drafts by the hidden state *before* the final norm, un-normed like the target's."""

    config: Eagle3Config
    embedding: Tensor  # [vocab, hidden], its own or the target's
    fc: Linear  # [hidden, layers * hidden]
    embedding_norm: RMSNorm
    hidden_norm: RMSNorm
    rotary: Rotary
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: DenseMLP
    norm: RMSNorm
    head: Linear
    backend: AttentionBackend
    target_ids: Tensor | None  # [vocab_size] int64; None: the target's vocabulary itself

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        return ()

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Eagle3:
        return self

    def project(self, aux_hidden_states: Tensor) -> Tensor:
        return self.fc(aux_hidden_states)

    def forward(self, inputs: PassInputs, plan: PassPlan, exchange: RowExchange) -> Hidden:
        cos_sin = self.rotary(inputs.positions, self.dtype)
        x = concat_normed(inputs, self.embedding, self.embedding_norm, self.hidden_norm)
        x = self.attention(x, cos_sin, plan.attention)
        # NOTE: a sum overwrites its second operand, and the hidden state is the caller's.
        x, residual = self.post_attention_norm.add(inputs.hidden, x)
        return Hidden(*self.norm.add(self.mlp(x), residual))

    def token_ids(self, best: Tensor) -> Tensor:
        return best if self.target_ids is None else self.target_ids[best]

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        row = own_rows * self.hidden_size * self.dtype.itemsize
        concat = 5 * row  # embedding, both norms, and their concatenation
        attention = 2 * row + self.attention.activation_bytes(own_rows)
        normed = 4 * row + self.norm.activation_bytes(own_rows)
        mlp = 2 * row + self.mlp.activation_bytes(own_rows)
        cos_sin = own_rows * self.config.head_dim * self.dtype.itemsize
        return cos_sin + max(concat, attention, normed, mlp)


class Eagle3Method:
    skippable_tensors = ("^t2d$", r"\brotary_emb\.inv_freq$")  # both follow from what is read

    def read_config(self, directory: str, target: ModelConfig) -> Eagle3Config:
        return read_config(directory, target)

    def build(
        self,
        config: DraftConfig,
        target: Model,
        weights: WeightSource,
        sharding: RankSharding,
        backend: AttentionBackend,
        moe: MoeKernels,
    ) -> Eagle3:
        """Load the whole head: it has no experts to shard."""
        assert isinstance(config, Eagle3Config), config
        hidden, prefix = config.hidden_size, config.layer_prefix
        aux_size = len(config.aux_hidden_state_layers) * hidden
        mixer, paged = f"{prefix}.self_attn", backend.layer(0)

        def norm(name: str) -> RMSNorm:
            return RMSNorm.load(weights, name, hidden, config.rms_norm_eps)

        sizes = (config.target_vocab_size, hidden)
        return Eagle3(
            config=config,
            embedding=weights.load(EMBEDDING, sizes) if config.own_embedding else target.embedding,
            fc=Linear.load(weights, {"fc": hidden}, aux_size),
            embedding_norm=norm(f"{prefix}.input_layernorm"),
            hidden_norm=norm(f"{prefix}.hidden_norm"),
            rotary=Rotary.from_config(config.rope, config.head_dim, weights.device),
            attention=Attention.load(
                config.attention, weights, mixer, paged, input_size=2 * hidden
            ),
            post_attention_norm=norm(f"{prefix}.post_attention_layernorm"),
            mlp=DenseMLP.load(weights, f"{prefix}.mlp", hidden, config.intermediate_size),
            norm=norm("norm"),
            head=Linear.load(weights, {"lm_head": config.vocab_size}, hidden),
            backend=backend,
            target_ids=load_target_ids(config, weights) if config.reduced else None,
        )


METHOD = Eagle3Method()


def load_target_ids(config: Eagle3Config, weights: WeightSource) -> Tensor:
    """Add to each draft id, [vocab_size] int64, how far the target's id lies above it (`d2t`)."""
    offsets = weights.integers(MAP, (config.vocab_size,))
    ids = torch.arange(config.vocab_size, device=offsets.device) + offsets
    if ids.device.type != "meta":
        outside = ids[(ids < 0) | (ids >= config.target_vocab_size)]
        allowed = f"tokens of the target, below {config.target_vocab_size}"
        require(not len(outside), f"{config.directory}: {MAP}", outside[:1].tolist(), allowed)
    return ids
