"""The MoE stage's Triton kernels, compiled at start so that none is compiled while serving."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.expert_tiles import ExpertTiles, choose_tiles
from dp_runtime.kernels.experts import run_experts
from dp_runtime.kernels.jit_build import JitModule
from dp_runtime.kernels.moe_router import MAX_SPLIT_ROWS, route
from dp_runtime.layers.experts import ExpertShard, aligned
from dp_runtime.models.config import ModelConfig
from dp_runtime.weights.fp8_blocks import ExpertScales


def moe_jit_modules(
    model: ModelConfig,
    shard: ExpertShard,
    dp_size: int,
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[JitModule, ...]:
    """List the stage's kernels with all tiles that 1 to max_rows gathered rows choose."""
    if not model.num_moe_layers:
        return ()
    num_local = 0 if shard.is_empty else len(shard.experts)
    inner = aligned(len(shard.intermediate))
    top_k, experts = model.num_experts_per_tok, model.num_experts
    formats = sorted({fp8 for moe, fp8 in zip(model.moe_layers, model.fp8_experts) if moe})
    tilings = {choose_tiles(rows, top_k, experts, inner): None for rows in range(1, max_rows + 1)}
    build = partial(
        _build, tuple(tilings), formats, model, (num_local, inner), dp_size, dtype, device
    )
    # One module, for Triton's compiler runs in one thread of a process.
    return (JitModule(f"Triton experts ({len(tilings)} tilings)", build),)


def _build(
    tilings: Sequence[ExpertTiles],
    formats: Sequence[bool],
    model: ModelConfig,
    shard: tuple[int, int],
    dp_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Run the kernels over padding only: they are compiled, and read no expert's weight."""
    num_local, inner = shard
    rows = torch.zeros(MAX_SPLIT_ROWS + 1, model.hidden_size, dtype=dtype, device=device)
    router = rows.new_zeros(model.num_experts, model.hidden_size)
    row_ranges = torch.zeros(2, dp_size, dtype=torch.int32, device=device)
    top_k, renormalize = model.num_experts_per_tok, model.norm_topk_prob
    route(rows, router, row_ranges, top_k, renormalize, 0, num_local)
    routing = route(rows[:1], router, row_ranges, top_k, renormalize, 0, num_local)
    for fp8 in formats:
        weight = rows.new_empty(1, dtype=E4M3 if fp8 else dtype)
        gate_up = weight.expand(num_local, 2 * inner, model.hidden_size)
        down = weight.expand(num_local, model.hidden_size, inner)
        scale = rows.new_empty(1, dtype=torch.float32)
        scales = ExpertScales(scale, scale) if fp8 else None
        for tiles in tilings:
            run_experts(rows[:1], gate_up, down, routing, tiles, scales)
