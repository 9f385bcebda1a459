"""All that is compiled at start, so that nothing is while serving."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module

import numpy as np
import torch

from dp_runtime.attention.registry import backend_class
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.core.recurrent_metadata import MAX_STEPPED, Drafts, RecurrentMetadata, Tracks
from dp_runtime.core.request import RoutingShape
from dp_runtime.kernels.dense_linear.measured import FewRowsTiles
from dp_runtime.kernels.dense_linear.tiles import TAIL, DenseTile
from dp_runtime.kernels.expert_tiles import ExpertTiles, choose_tiles
from dp_runtime.kernels.fp8_linear.tiles import (
    NUM_COUNTERS,
    LinearTile,
    choose_tile,
    widened_from,
)
from dp_runtime.kernels.jit_build import JitModule, in_one_thread
from dp_runtime.layers.experts import ExpertShard, aligned
from dp_runtime.layers.gated_delta_net import GatedDeltaNet, GatedDeltaNetShape
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe_kernels import make_moe_kernels
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.layers.routing_buffer import RoutingBuffer
from dp_runtime.models.config import ModelConfig
from dp_runtime.models.qwen3_5.config import HybridConfig
from dp_runtime.startup.memory_estimate import Fp8Shape
from dp_runtime.startup.rank_plan import RankPlan
from dp_runtime.weights.fp8_blocks import BLOCK, ExpertScales, num_blocks


def jit_modules_of(plan: RankPlan) -> tuple[JitModule, ...]:
    """List all that is compiled before a plan can be served."""
    device = torch.device(plan.device)
    cls, specs = backend_class(plan.backend), dict.fromkeys(p.attention for p in plan.layers)
    attention = [module for spec in specs for module in cls.jit_modules(spec, device)]
    own = *_moe_kernels(plan), *_delta_kernels(plan), *_dense_kernels(plan)
    return in_one_thread([*attention, *own])


def _moe_kernels(plan: RankPlan) -> tuple[JitModule, ...]:
    if not make_moe_kernels(plan.moe_backend).compiled:
        return ()
    import_module("dp_runtime.kernels.experts")  # now, for a standby has time until it builds
    model = plan.model
    shard = plan.sharding.shard(model.num_experts, model.moe_intermediate_size)
    ranks = plan.sharding.dp_size
    max_rows = plan.limits.max_num_tokens * ranks
    on = plan.dtype, torch.device(plan.device), plan.routing
    return moe_jit_modules(model, shard, ranks, max_rows, *on)


def _delta_kernels(plan: RankPlan) -> tuple[JitModule, ...]:
    model, device = plan.model, torch.device(plan.device)
    if device.type == "cpu" or not isinstance(model, HybridConfig) or not plan.slot_bytes:
        return ()
    import_module("dp_runtime.kernels.gated_delta.chunked")
    max_drafts = plan.limits.max_drafts
    return (delta_net_jit_module(model.delta_net, max_drafts, plan.dtype, device),)


def _dense_kernels(plan: RankPlan) -> tuple[JitModule, ...]:
    modules, dense, on = list[JitModule](), plan.dense, (plan.dtype, torch.device(plan.device))
    if dense.fp8_shapes:
        import_module("dp_runtime.kernels.fp8_linear.run")
        modules.append(dense_jit_module(dense.fp8_shapes, plan.limits.max_num_tokens, *on))
    if dense.few_rows_tiles:
        import_module("dp_runtime.kernels.dense_linear.run")
        modules.append(few_rows_jit_module(dense.few_rows_tiles, *on))
    return tuple(modules)


def few_rows_jit_module(
    matrices: Sequence[FewRowsTiles], dtype: torch.dtype, device: torch.device
) -> JitModule:
    """Make a module of the products of few rows with matrices of these shapes."""
    kinds = {
        (*tile.kind(tiles.inputs), 256 + tiles.outputs % TAIL): None
        for tiles in matrices
        for tile in tiles.tiles
    }
    multiply = partial(_multiply_few_rows, tuple(kinds), dtype, device)
    return JitModule("Triton matrices of few rows", multiply, by_triton=True)


def _multiply_few_rows(
    kinds: Sequence[tuple[DenseTile, int, int]], dtype: torch.dtype, device: torch.device
) -> None:
    from dp_runtime.kernels.dense_linear.run import multiply

    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
    for tile, inputs, outputs in kinds:
        weight = torch.zeros(outputs, inputs, dtype=dtype, device=device)
        multiply(weight[:2], weight, weight.new_empty(2, outputs), counters, tile)


def dense_jit_module(
    shapes: Sequence[Fp8Shape], max_rows: int, dtype: torch.dtype, device: torch.device
) -> JitModule:
    """Make a module of the products of up to so many rows with matrices that stay e4m3."""
    kinds = dict[tuple[LinearTile | None, Fp8Shape], None]()
    for shape in shapes:
        small = _with_tails_of(shape)
        for rows in range(1, min(max_rows, widened_from(shape.outputs, shape.inputs)) + 1):
            tile = choose_tile(rows, shape.outputs, shape.inputs)
            if tile is not None:
                tile = replace(tile, split=min(tile.split, 2))
            kinds[tile, small] = None
    multiply = partial(_multiply, tuple(kinds), dtype, device)
    return JitModule("Triton e4m3 matrices", multiply, by_triton=True)


def _with_tails_of(shape: Fp8Shape) -> Fp8Shape:
    outputs, inputs = 2 * BLOCK + shape.outputs % BLOCK, 2 * BLOCK + shape.inputs % BLOCK
    return Fp8Shape(outputs, inputs, outputs + (shape.all_outputs - shape.outputs) % BLOCK)


def _multiply(
    kinds: Sequence[tuple[LinearTile | None, Fp8Shape]], dtype: torch.dtype, device: torch.device
) -> None:
    """Run each kernel with a small matrix: what is compiled depends on sizes up to their tails."""
    from dp_runtime.kernels.fp8_linear.run import multiply, widened

    zeros = partial(torch.zeros, device=device)
    for tile, shape in kinds:
        weight = zeros(shape.outputs, shape.inputs, dtype=E4M3)
        scales = zeros(num_blocks(shape.inputs), shape.outputs)
        if tile is None:
            widened(weight, scales, dtype)
            continue
        x, out = (zeros(2, size, dtype=dtype) for size in (shape.inputs, shape.all_outputs))
        counters = zeros(NUM_COUNTERS, dtype=torch.int32)
        multiply(x, weight, scales, out[:, : shape.outputs], counters, tile)


def moe_jit_modules(
    model: ModelConfig,
    shard: ExpertShard,
    dp_size: int,
    max_rows: int,
    dtype: torch.dtype,
    device: torch.device,
    routing_shape: RoutingShape | None = None,  # if choices are kept
) -> tuple[JitModule, ...]:
    """List a MoE stage's kernels with all tiles that 1 to max_rows gathered rows choose."""
    if not model.num_moe_layers:
        return ()
    num_local = 0 if shard.is_empty else len(shard.experts)
    inner = aligned(len(shard.intermediate))
    top_k, experts = model.num_experts_per_tok, model.num_experts
    formats = sorted({fp8 for moe, fp8 in zip(model.moe_layers, model.fp8_experts) if moe})
    tilings = {
        (fp8, choose_tiles(rows, top_k, experts, inner, fp8)): None
        for fp8 in formats
        for rows in range(1, max_rows + 1)
    }
    build = partial(
        _build, tuple(tilings), model, (num_local, inner), dp_size, dtype, device, routing_shape
    )
    return (JitModule(f"Triton experts ({len(tilings)} tilings)", build, by_triton=True),)


def _build(
    tilings: Sequence[tuple[bool, ExpertTiles]],  # for e4m3 weights if True
    model: ModelConfig,
    shard: tuple[int, int],
    dp_size: int,
    dtype: torch.dtype,
    device: torch.device,
    routing_shape: RoutingShape | None,
) -> None:
    """Run the kernels over padding only: they are compiled, and read no expert's weight."""
    from dp_runtime.kernels.experts import run_experts
    from dp_runtime.kernels.moe_router import MAX_SPLIT_ROWS, choose_router_tile, route

    num_local, inner = shard
    rows = torch.zeros(MAX_SPLIT_ROWS + 1, model.hidden_size, dtype=dtype, device=device)
    router = rows.new_zeros(model.num_experts, model.hidden_size)
    row_ranges = torch.zeros(2, dp_size, dtype=torch.int32, device=device)
    top_k, renormalize = model.num_experts_per_tok, model.norm_topk_prob
    kept = None if routing_shape is None else RoutingBuffer(routing_shape, 1, 0, device).layer(0)
    sizes = {choose_router_tile(n, *router.shape[::-1]): n for n in range(len(rows), 0, -1)}
    for n in sizes.values():  # the last: 1 row
        routing = route(rows[:n], router, row_ranges, top_k, renormalize, 0, num_local, kept)
    for fp8, tiles in tilings:
        weight = rows.new_empty(1, dtype=E4M3 if fp8 else dtype)
        gate_up = weight.expand(num_local, 2 * inner, model.hidden_size)
        down = weight.expand(num_local, model.hidden_size, inner)
        scale = rows.new_empty(1, dtype=torch.float32)
        scales = ExpertScales(scale, scale) if fp8 else None
        run_experts(rows[:1], gate_up, down, routing, tiles, scales)


def delta_net_jit_module(
    shape: GatedDeltaNetShape, max_drafts: int, dtype: torch.dtype, device: torch.device
) -> JitModule:
    """Make a module of all kernels of the gated delta nets of this shape."""
    mix = partial(_mix, shape, max_drafts, dtype, device)
    return JitModule("Triton gated delta nets", mix, by_triton=True)


def _mix(
    shape: GatedDeltaNetShape, max_drafts: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Run a prompt, and decodes, of the null slot: the kernels are compiled, and write no state."""
    from dp_runtime.kernels.slot_copy import copy_slots, slot_table

    heads = shape.num_v_heads
    no_weight = Linear(torch.zeros(0, 0, dtype=dtype, device=device), None)
    zeros = partial(torch.zeros, device=device)
    net = GatedDeltaNet(
        inputs=no_weight,
        conv=zeros(shape.conv_width, shape.channels, dtype=dtype),
        decay=zeros(heads),
        dt_bias=zeros(heads),
        norm=RMSNorm(zeros(shape.head_v_dim, dtype=dtype), shape.norm_eps),
        output=no_weight,
        state=shape.state(dtype, max_drafts).allocate(1, device),
        shape=shape,
        in_kernels=True,
    )
    for lengths in ([MAX_STEPPED + 1, 1], [1, 1]):
        for has_tracks in (False, True):
            of = _null_sequences(lengths, max_drafts, has_tracks, device)
            net.mix(zeros(sum(lengths), shape.projected_size, dtype=dtype), of)
    copy_slots(*slot_table(list(net.state)), zeros(1, 2, dtype=torch.int64))


def _null_sequences(
    lengths: list[int], max_drafts: int, has_tracks: bool, device: torch.device
) -> RecurrentMetadata:
    query_lens = np.array(lengths, np.int32)
    none = torch.zeros(len(lengths), dtype=torch.int32, device=device)
    return RecurrentMetadata(
        cu_seqlens=torch.tensor([0, *query_lens.cumsum()], dtype=torch.int32, device=device),
        query_lens_host=query_lens,
        slots=none.long(),
        is_fresh=none.bool(),
        drafts=Drafts(none, none) if max_drafts else None,
        tracks=Tracks(none.long(), none, np.zeros_like(query_lens)) if has_tracks else None,
    )
