"""The least a rank must read or compute in a decode step, part by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dp_runtime.core.cache_spec import PagedKv, RecurrentState
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.qwen3_5.config import HybridConfig
from dp_runtime.weights.fp8_blocks import BLOCK

BYTES = 2  # bf16; experts may be e4m3
SCALE_BYTES = 4 / BLOCK  # of each e4m3 weight beside the experts


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes that one rank moves in its own memory in a decode step, or in a speculative one.

    Recurrent states are written, too.
    """

    experts: float
    dense_weights: float  # of attention, recurrent layers and shared experts
    lm_head: float
    kv_cache: float
    states: float  # read once and written once, however many drafts there are

    @classmethod
    def for_step(
        cls,
        model: ModelConfig,
        dp_size: int,
        rows: float,
        context: float,
        active_experts: float | None = None,
        num_drafts: int = 0,
        draft_vocab: int | None = None,
        keeps_fp8: bool = False,
    ) -> DecodeBytes:
        """rows: requests of the rank; context: mean tokens in the cache of each.

        active_experts: of a layer, over all ranks; None: the mean for uniform routing of the rows
        of all ranks. num_drafts: of each request, by an MTP layer of the model's kind, which runs
        once for each (draft passes and draft_extend), with draft_vocab rows of the LM head, or all.
        keeps_fp8: matrices of an e4m3 checkpoint that are not the experts' are not widened either.
        """
        if active_experts is None:
            active_experts = uniform_active(model, rows * dp_size * (1 + num_drafts))
        expert = 3 * model.moe_intermediate_size * model.hidden_size
        formats = zip(model.moe_layers, model.fp8_experts, strict=True)
        per_weight = sum((1 if fp8 else BYTES) for moe, fp8 in formats if moe)  # of all layers
        per_weight += BYTES * num_drafts
        of_draft = draft_vocab or model.vocab_size
        caches = model.cache_specs(1, torch.bfloat16, torch.bfloat16, num_drafts)
        attending = _attending(model) + num_drafts
        slot = sum(cache.slot_bytes for cache in caches if isinstance(cache, RecurrentState))
        return cls(
            experts=per_weight * expert * active_experts / dp_size,
            dense_weights=_dense_bytes(model, attending, num_drafts, keeps_fp8),
            lm_head=BYTES * model.hidden_size * (model.vocab_size + num_drafts * of_draft),
            kv_cache=BYTES * attending * rows * context * 2 * model.num_kv_heads * model.head_dim,
            states=2 * rows * slot,
        )

    @property
    def total(self) -> float:
        return self.experts + self.dense_weights + self.lm_head + self.kv_cache + self.states

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in vars(self).items())
        return f"GB that a rank moves: {parts}"

    def milliseconds(self, bytes_per_s: float) -> float:
        return self.total / bytes_per_s * 1e3


@dataclass(frozen=True)
class DecodeOperations:
    """Operations of one rank's matrix products in such a step; each part as in DecodeBytes."""

    experts: float
    dense_weights: float
    lm_head: float
    kv_cache: float  # queries with keys, and their weights with values
    states: float = 0.0  # not counted: moving the states takes longer

    @classmethod
    def for_step(
        cls, model: ModelConfig, rows: float, context: float, num_drafts: int = 0,
        draft_vocab: int | None = None,
    ) -> DecodeOperations:  # fmt: skip
        """Count what must be computed: a draft layer at least for one row of every request.

        The experts' share of a rank is on average that of its own rows.
        """
        verified, drafted = rows * (1 + num_drafts), rows * num_drafts
        target = _dense_weights(model, _attending(model), 0)
        draft = _dense_weights(model, _attending(model) + 1, 1) - target
        expert = 3 * model.moe_intermediate_size * model.hidden_size * model.num_experts_per_tok
        head = model.vocab_size * verified + (draft_vocab or model.vocab_size) * drafted
        scores = 2 * model.num_heads * model.head_dim * context
        return cls(
            experts=2 * expert * (model.num_moe_layers * verified + drafted),
            dense_weights=2 * (target * verified + draft * drafted),
            lm_head=2 * head * model.hidden_size,
            kv_cache=2 * scores * (_attending(model) * verified + drafted),
        )


def longer_parts_s(
    moved: DecodeBytes, computed: DecodeOperations, bytes_per_s: float, operations_per_s: float
) -> dict[str, float]:
    """Seconds of every part: what must be moved or computed, whichever takes longer."""
    return {
        part: max(count / bytes_per_s, getattr(computed, part) / operations_per_s)
        for part, count in vars(moved).items()
    }


def _attending(model: ModelConfig) -> int:
    """Count layers that read a KV cache."""
    caches = model.cache_specs(1, torch.bfloat16, torch.bfloat16, 0)
    return sum(isinstance(cache, PagedKv) for cache in caches)


def _dense_bytes(model: ModelConfig, attending: int, num_drafts: int, keeps_fp8: bool) -> float:
    weights = _dense_weights(model, attending, num_drafts)
    if not keeps_fp8 or model.fp8_exempt is None:
        return BYTES * weights
    wide = num_drafts * 2 * model.hidden_size**2
    if isinstance(model, HybridConfig):  # b and a of delta nets
        nets = sum(model.delta_net_layers)
        wide += nets * 2 * model.delta_net.num_v_heads * model.hidden_size
    return BYTES * wide + (1 + SCALE_BYTES) * (weights - wide)


def _dense_weights(model: ModelConfig, attending: int, num_drafts: int) -> int:
    """Count weights of layers beside their routed experts, and of the draft layer as often."""
    hidden, layers = model.hidden_size, model.num_layers + num_drafts
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    fuse = num_drafts * 2 * hidden**2
    if not isinstance(model, HybridConfig):
        return layers * heads * model.head_dim * hidden + fuse
    net = model.delta_net
    heads += model.num_heads  # the gate's
    mixers = attending * heads * model.head_dim
    mixers += (layers - attending) * (net.projected_size + net.v_size)
    shared = layers * 3 * model.shared_expert_intermediate_size
    return (mixers + shared) * hidden + fuse


def uniform_active(model: ModelConfig, rows: float) -> float:
    """Experts of a layer that any of so many rows chooses, on average, if it chooses evenly."""
    missed = (1 - model.num_experts_per_tok / model.num_experts) ** rows
    return model.num_experts * (1 - missed)
