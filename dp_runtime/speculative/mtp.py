"""MTP: the multi-token-prediction layer that a Qwen checkpoint has under `mtp.`, used recursively.

Its input is fc(cat(norm(embedding of the token), norm(hidden state))), what follows is a decoder
layer of the target's kind; embedding and LM head are the target's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionBackend
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.errors import require
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.rotary import Rotary
from dp_runtime.models.causal_lm import DecoderLayer, Hidden, PassInputs
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.fp8_config import parse_fp8_experts
from dp_runtime.models.hf_config import ConfigFields
from dp_runtime.models.known_tensors import SKIPPABLE_WHILE_DRAFTING
from dp_runtime.models.lm_head import LmHeadMixin
from dp_runtime.models.model import Model
from dp_runtime.models.qwen3_moe import ARCHITECTURE
from dp_runtime.parallel.exchange import RowExchange
from dp_runtime.speculative.draft import DraftConfig, beside
from dp_runtime.weights.source import WeightSource

LAYER = "mtp.layers.0"
SKIPPABLE = SKIPPABLE_WHILE_DRAFTING
COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")  # what config.json may call them


@dataclass(frozen=True)
class MtpConfig(DraftConfig):
    """layer: the target's configuration, of which the MTP layer is the only one."""

    layer: ModelConfig


def read_config(directory: str, target: ModelConfig) -> MtpConfig:
    """The first MTP layer of a target; ValueError if it has none."""
    fields = ConfigFields.read(Path(directory) / "config.json")
    count = max(fields.integer(name, 0, least=0) for name in COUNTS)
    require(
        count >= 1 and target.architecture == ARCHITECTURE.name,
        "speculative_draft_model", None,
        f"name the directory of an EAGLE-3 head: {directory} is no Qwen3MoeForCausalLM with "
        f"{COUNTS[0]} or {COUNTS[1]} >= 1, which would have a draft layer of its own",
    )  # fmt: skip
    fp8 = parse_fp8_experts(fields, [f"{LAYER}.mlp.experts"], ARCHITECTURE.expert_names)
    layer = replace(target, num_layers=1, moe_layers=(True,), fp8_experts=fp8)
    return MtpConfig(
        "mtp", directory, 1, target.num_heads, target.num_kv_heads, target.head_dim,
        target.vocab_size, target.hidden_size, (), layer,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Mtp(LmHeadMixin):
    """One MTP layer; what it returns is behind its norm, as what it takes is behind the target's.

    A checkpoint in which that makes a difference has been trained so (Qwen3-Next, Qwen3.5).
    """

    config: MtpConfig
    embedding: Tensor  # [vocab, hidden], the target's
    head: Linear  # the target's
    embedding_norm: RMSNorm
    hidden_norm: RMSNorm
    fc: Linear  # [hidden, 2 * hidden]
    rotary: Rotary
    layer: DecoderLayer
    norm: RMSNorm

    @property
    def dtype(self) -> torch.dtype:
        return self.fc.weight.dtype

    @property
    def moe_stages(self) -> tuple[MoeStage, ...]:
        return (self.layer.mlp,) if isinstance(self.layer.mlp, MoeStage) else ()

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Mtp:
        (stage,) = self.moe_stages
        return replace(self, layer=replace(self.layer, mlp=make(stage)))

    def project(self, features: Tensor) -> Tensor:
        return features

    def forward(
        self, inputs: PassInputs, metadata: AttentionMetadata, exchange: RowExchange
    ) -> Hidden:
        x = self.fc(beside(inputs, self.embedding, self.embedding_norm, self.hidden_norm))
        cos_sin = self.rotary(inputs.positions, x.dtype)
        x, residual = self.layer(x, None, cos_sin, metadata, exchange)
        last = self.norm.add(x, residual)[0]
        return Hidden(last, last)

    def token_ids(self, best: Tensor) -> Tensor:
        return best

    def forward_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        hidden, size = self.hidden_size, self.dtype.itemsize
        fuse = 5 * own_rows * hidden * size  # embedding, both norms, and these side by side
        normed = 2 * own_rows * hidden * size + self.norm.activation_bytes(own_rows)
        layer = self.layer.activation_bytes(own_rows, gathered_rows, padded)
        layer += own_rows * (hidden + self.config.head_dim) * size  # its input, cos and sin
        return max(fuse, normed, layer)


def build(
    config: MtpConfig,
    target: Model,
    weights: WeightSource,
    sharding: RankSharding,
    attention: Callable[[int], AttentionBackend],
    moe: MoeKernels,
) -> Mtp:
    hidden, eps = config.hidden_size, config.layer.rms_norm_eps
    mlp = ARCHITECTURE.load_mlp(config.layer, 0, LAYER, weights, sharding, moe)
    return Mtp(
        config,
        target.embedding,
        target.head,
        RMSNorm.load(weights, "mtp.pre_fc_norm_embedding", hidden, eps),
        RMSNorm.load(weights, "mtp.pre_fc_norm_hidden", hidden, eps),
        Linear.load(weights, {"mtp.fc": hidden}, 2 * hidden),
        Rotary.of(config.layer.rope, config.head_dim, weights.device),
        DecoderLayer.load(config.layer, weights, LAYER, attention(0), mlp),
        RMSNorm.load(weights, "mtp.norm", hidden, eps),
    )
