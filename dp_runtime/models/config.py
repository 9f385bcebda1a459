"""ModelConfig: the architecture-independent facts of a model, checked at start."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from dp_runtime.core.cache_spec import CacheSpec, PagedKv
from dp_runtime.errors import require
from dp_runtime.layers.attention import AttentionShape
from dp_runtime.layers.rotary import RopeConfig
from dp_runtime.vision.config import VisionConfig
from dp_runtime.weights.fp8_blocks import BLOCK

logger = logging.getLogger(__name__)

MAX_EXPERTS = 2**18  # of all layers together


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The facts of a whole model that its layers need."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    intermediate_size: int  # of layers without experts
    moe_layers: tuple[bool, ...]  # [layer]; the others have a dense MLP
    fp8_experts: tuple[bool, ...]  # [layer]; e4m3 in the checkpoint, scales as in fp8_blocks
    norm_topk_prob: bool
    tie_word_embeddings: bool
    attention_bias: bool
    qk_norm: bool
    max_position_embeddings: int
    sliding_window: int | None  # not supported, so no sequence may be longer
    eos_token_ids: tuple[int, ...]  # of generation_config.json where it names any
    fp8_exempt: tuple[str, ...] | None = None  # other modules that are not; None: none is e4m3
    vision: VisionConfig | None = None  # None: images are not served

    def __post_init__(self) -> None:
        where = "config.json: "
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"{where}num_key_value_heads", self.num_kv_heads,
            f"a divisor of num_attention_heads {self.num_heads}",
        )  # fmt: skip
        require(self.head_dim % 2 == 0, f"{where}head_dim", self.head_dim, "an even number")
        require(
            self.num_experts_per_tok <= self.num_experts,
            f"{where}num_experts_per_tok", self.num_experts_per_tok,
            f"at most the number of experts, {self.num_experts}",
        )  # fmt: skip
        # Grouped matrix products want rows whose length is a multiple of 16 bytes in any dtype.
        require(
            self.hidden_size % 8 == 0, f"{where}hidden_size", self.hidden_size, "a multiple of 8"
        )
        require(
            self.num_experts * self.num_layers <= MAX_EXPERTS,
            f"{where}num_hidden_layers", self.num_layers,
            f"at most {MAX_EXPERTS:,} experts in all layers of {self.num_experts}",
        )  # fmt: skip
        assert len(self.moe_layers) == self.num_layers, "moe_layers has one entry per layer"
        assert len(self.fp8_experts) == self.num_layers, "fp8_experts has one entry per layer"
        if any(self.fp8_experts):
            for name in ("hidden_size", "moe_intermediate_size"):
                size = getattr(self, name)
                allowed = f"a multiple of {BLOCK}, as e4m3 experts have a scale for each {BLOCK}"
                require(size % BLOCK == 0, f"{where}{name}", size, allowed)

    @property
    def num_moe_layers(self) -> int:
        return sum(self.moe_layers)

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            self.hidden_size, self.num_heads, self.num_kv_heads, self.head_dim,
            self.attention_bias, self.rms_norm_eps if self.qk_norm else None,
        )  # fmt: skip

    def cache_specs(
        self, page_size: int, kv_dtype: torch.dtype, dtype: torch.dtype, max_drafts: int = 0
    ) -> tuple[CacheSpec, ...]:
        """List what each layer keeps between passes that may verify so many drafts, [layer]."""
        kv = PagedKv(self.num_kv_heads, self.head_dim, page_size, kv_dtype)
        return (kv,) * self.num_layers

    def resolve_max_model_len(self, requested: int | None) -> int:
        positions, window = self.max_position_embeddings, self.sliding_window
        if window is not None and window < positions:
            allowed = f"at most the model's sliding_window {window}, which is not supported beyond"
            require(requested is None or requested <= window, "max_model_len", requested, allowed)
            if requested is None:
                logger.info("max_model_len is %d: the model's sliding_window", window)
            return requested or window
        length = requested or positions
        require(
            length <= positions, "max_model_len", length, f"the model has {positions} positions"
        )
        return length
