"""EAGLE-3: a draft head of one dense layer over features of three target layers (arXiv 2503.01840).

The format is that of the published heads whose architecture is LlamaForCausalLMEagle3. The layer's
attention takes the normed embedding and the normed hidden state side by side; the residual is the
hidden state alone. Logits are those of a reduced vocabulary: `d2t` says for each of its tokens how
far the target's id lies beyond its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionBackend
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.errors import require
from dp_runtime.layers.attention import Attention
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.mlp import DenseMLP
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import Rotary
from dp_runtime.models.causal_lm import Hidden, PassInputs
from dp_runtime.models.lm_head import LmHeadMixin
from dp_runtime.models.model import Model
from dp_runtime.parallel.exchange import RowExchange
from dp_runtime.speculative.draft import beside
from dp_runtime.speculative.eagle3_config import EMBEDDING, MAP, Eagle3Config, read_config
from dp_runtime.weights.source import WeightSource

__all__ = ["SKIPPABLE", "Eagle3", "build", "read_config"]

SKIPPABLE = ("^t2d$", r"\brotary_emb\.inv_freq$")  # both follow from what is read


@dataclass(frozen=True, eq=False)
class Eagle3(LmHeadMixin):
    """A head; a chained draft takes what is before its norm, as features are before any."""

    config: Eagle3Config
    embedding: Tensor  # [vocab, hidden], its own or the target's
    fc: Linear  # [hidden, features]
    embedding_norm: RMSNorm
    hidden_norm: RMSNorm
    rotary: Rotary
    attention: Attention
    post_attention_norm: RMSNorm
    mlp: DenseMLP
    norm: RMSNorm
    head: Linear
    target_ids: Tensor | None  # [vocab_size] int64; None: the target's vocabulary itself

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        return ()

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Eagle3:
        return self

    def project(self, features: Tensor) -> Tensor:
        return self.fc(features)

    def forward(
        self, inputs: PassInputs, metadata: AttentionMetadata, exchange: RowExchange
    ) -> Hidden:
        cos_sin = self.rotary(inputs.positions, self.dtype)
        x = beside(inputs, self.embedding, self.embedding_norm, self.hidden_norm)
        x = self.attention(x, cos_sin, metadata)
        # NOTE: a sum may overwrite its second operand, and the hidden state is the caller's.
        x, residual = self.post_attention_norm.add(inputs.hidden, x)
        return Hidden(*self.norm.add(self.mlp(x), residual))

    def token_ids(self, best: Tensor) -> Tensor:
        return best if self.target_ids is None else self.target_ids[best]

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        row = own_rows * self.hidden_size * self.dtype.itemsize
        beside = 5 * row  # embedding, both norms, and these side by side
        attention = 2 * row + self.attention.activation_bytes(own_rows)
        normed = 5 * row + self.norm.activation_bytes(own_rows)
        mlp = 2 * row + self.mlp.activation_bytes(own_rows)
        cos_sin = own_rows * self.config.head_dim * self.dtype.itemsize
        return cos_sin + max(beside, attention, normed, mlp)


def build(
    config: Eagle3Config,
    target: Model,
    weights: WeightSource,
    sharding: RankSharding,
    attention: Callable[[int], AttentionBackend],
    moe: MoeKernels,
) -> Eagle3:
    """Every rank holds the whole head: it has no experts to shard."""
    hidden, prefix = config.hidden_size, config.layer_prefix
    features = len(config.aux_hidden_state_layers) * hidden

    def norm(name: str) -> RMSNorm:
        return RMSNorm.load(weights, name, hidden, config.rms_norm_eps)

    sizes = (config.target_vocab_size, hidden)
    return Eagle3(
        config,
        weights.load(EMBEDDING, sizes) if config.own_embedding else target.embedding,
        Linear.load(weights, {"fc": hidden}, features),
        norm(f"{prefix}.input_layernorm"),
        norm(f"{prefix}.hidden_norm"),
        Rotary.of(config.rope, config.head_dim, weights.device),
        Attention.load(
            config.attention, weights, f"{prefix}.self_attn", attention(0), input_size=2 * hidden
        ),
        norm(f"{prefix}.post_attention_layernorm"),
        DenseMLP.load(weights, f"{prefix}.mlp", hidden, config.intermediate_size),
        norm("norm"),
        Linear.load(weights, {"lm_head": config.vocab_size}, hidden),
        load_target_ids(config, weights) if config.reduced else None,
    )


def load_target_ids(config: Eagle3Config, weights: WeightSource) -> Tensor:
    """The target's id of each token of the draft's vocabulary, [vocab_size] int64."""
    offsets = weights.integers(MAP, (config.vocab_size,))
    ids = torch.arange(config.vocab_size, device=offsets.device) + offsets
    if ids.device.type != "meta":
        outside = ids[(ids < 0) | (ids >= config.target_vocab_size)]
        allowed = f"tokens of the target, below {config.target_vocab_size}"
        require(not len(outside), f"{config.directory}: {MAP}", outside[:1].tolist(), allowed)
    return ids
