"""The least a rank must read in a decode step, part by part."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.models.config import ModelConfig

BYTES = 2  # bf16; experts may be e4m3


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one rank reads from its own memory in a decode step, or in a speculative one."""

    experts: float
    attention_weights: float
    lm_head: float
    kv_cache: float

    @classmethod
    def for_step(
        cls,
        model: ModelConfig,
        dp_size: int,
        rows: float,
        context: float,
        active_experts: float | None = None,
        num_drafts: int = 0,
    ) -> DecodeBytes:
        """rows: requests of the rank; context: mean tokens in the cache of each.

        active_experts: of a layer, over all ranks; None: the mean for uniform routing of the rows
        of all ranks. num_drafts: of each request, by an MTP layer of the model's kind, which runs
        once for each (draft passes and draft_extend), with the LM head.
        """
        if active_experts is None:
            active_experts = uniform_active(model, rows * dp_size * (1 + num_drafts))
        heads = 2 * model.num_heads + 2 * model.num_kv_heads
        expert = 3 * model.moe_intermediate_size * model.hidden_size
        formats = zip(model.moe_layers, model.fp8_experts, strict=True)
        per_weight = sum((1 if fp8 else BYTES) for moe, fp8 in formats if moe)  # of all layers
        layers = model.num_layers + num_drafts
        per_weight += BYTES * num_drafts
        fuse = BYTES * num_drafts * 2 * model.hidden_size**2
        return cls(
            experts=per_weight * expert * active_experts / dp_size,
            attention_weights=BYTES * layers * heads * model.head_dim * model.hidden_size + fuse,
            lm_head=BYTES * (1 + num_drafts) * model.vocab_size * model.hidden_size,
            kv_cache=BYTES * layers * rows * context * 2 * model.num_kv_heads * model.head_dim,
        )

    @property
    def total(self) -> float:
        return self.experts + self.attention_weights + self.lm_head + self.kv_cache

    def milliseconds(self, bytes_per_s: float) -> float:
        return self.total / bytes_per_s * 1e3


def uniform_active(model: ModelConfig, rows: float) -> float:
    """Experts of a layer that any of so many rows chooses, on average, if it chooses evenly."""
    missed = (1 - model.num_experts_per_tok / model.num_experts) ** rows
    return model.num_experts * (1 - missed)
