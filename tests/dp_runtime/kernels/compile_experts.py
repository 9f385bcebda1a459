"""Compiles kernels for an SM90, which takes no GPU: of experts, routing, attention, gates.

    TRITON_INTERPRET=0 python -m tests.dp_runtime.kernels.compile_experts

Tiles in use and candidates, bf16 and e4m3 weights; the interpreter knows neither tensor cores nor
shared memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.trtllm.measured import MeasuredTiles
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels import experts, gates, moe_router, split_attention
from dp_runtime.kernels.expert_tiles import FLAT, ExpertTiles, Tile, choose_tiles
from dp_runtime.kernels.experts import down_pairs, gate_up_pairs
from dp_runtime.kernels.moe_router import Routing
from dp_runtime.weights.fp8_blocks import scale_shape
from tests.dp_runtime.kernels.gated_delta.compile_all import Compiled

HIDDEN, INTERMEDIATE, EXPERTS, LOCAL, TOP_K = 2048, 768, 128, 32, 8
ROWS = (16, 100, 300, 700, 1000, 2000, 4000)
NARROW, ROWS_OF_NARROW = 128, (16, 700, 1000)


def tiles(fp8: bool) -> Iterator[ExpertTiles]:
    for rows in ROWS:
        yield choose_tiles(rows, TOP_K, EXPERTS, INTERMEDIATE, fp8)
    for swapped in (
        Tile(16, 64, 128, 4, 5 if fp8 else 3, True, swap=True),
        Tile(32, 128, 128 if fp8 else 64, 8, 3, True, swap=True, f16=fp8),
        Tile(64, 128, 64, 8, 4, True, FLAT, swap=True, f16=fp8),
    ):
        regrouped = replace(swapped, regroup=fp8)
        yield ExpertTiles(regrouped, regrouped)
    tall = Tile(128, 64, 64, 4, 3, True, FLAT, rest=64)
    yield ExpertTiles(replace(tall, joint=not fp8), replace(tall, rest=32))


def compile_attention() -> None:
    instead: dict[str, Any] = {"overlaps": lambda device: True}
    for name in ("split_kernel", "combine_kernel"):
        instead[name] = Compiled(getattr(split_attention, name))
    table, lengths = torch.zeros(64, 2, dtype=torch.int32), torch.ones(64, dtype=torch.int32)
    bf16, query_lens = torch.bfloat16, frozenset({1, 4, 8})
    with patch.multiple(split_attention, **instead):
        for heads, kv_heads, dim in ((32, 4, 128), (16, 2, 256), (32, 2, 256)):
            pool = torch.zeros(2, 2, kv_heads, 64, dim, dtype=bf16)
            spec = AttentionSpec(heads, kv_heads, dim, 64, bf16, bf16, query_lens)
            for query_len, row in MeasuredTiles.of(spec).used:
                q = torch.zeros(64 * query_len, heads, dim, dtype=bf16)
                own = q, pool, table, lengths, 0.1
                split_attention.split_attention(*own, torch.empty_like(q), row.tile)


def compile_routing() -> None:
    instead: dict[str, Any] = {"overlaps": lambda device: True}
    for name in ("_product_kernel", "_route_kernel"):
        instead[name] = Compiled(getattr(moe_router, name))
    ranges = torch.zeros(2, 4, dtype=torch.int32)
    with patch.multiple(moe_router, **instead):
        for hidden, num_experts, top_k in ((2048, 128, 8), (2048, 256, 8), (4096, 512, 10)):
            router = torch.zeros(num_experts, hidden, dtype=torch.bfloat16)
            for n in (16, 64, 256, 512, 600):
                rows = torch.zeros(n, hidden, dtype=torch.bfloat16)
                moe_router.route(rows, router, ranges, top_k, True, 0, num_experts // 4)


def compile_gates() -> None:
    instead: dict[str, Any] = {"overlaps": lambda device: True}
    for name in ("_multiply_gate_kernel", "_add_gated_kernel"):
        instead[name] = Compiled(getattr(gates, name))
    with patch.multiple(gates, **instead):
        for hidden, inner in ((2048, 512), (4096, 8192)):
            rows, both = (torch.zeros(4, n, dtype=torch.bfloat16) for n in (hidden, 2 * inner))
            for silu in (False, True):
                gates.multiply_gate(both[:, :inner], both[:, inner:], silu)
            gates.add_gated(rows, rows, rows, rows[:1])


def compile_experts(dtype: torch.dtype, intermediate: int, chosen: Iterable[ExpertTiles]) -> None:
    rows = torch.zeros(4, HIDDEN, dtype=torch.bfloat16)
    routing = Routing(
        weights=torch.zeros(4, TOP_K),
        local_ids=torch.zeros(4, TOP_K, dtype=torch.int32),
        counts=torch.zeros(LOCAL, dtype=torch.int32),
        pairs=torch.zeros(LOCAL, 4, dtype=torch.int32),
    )
    gate_up = torch.empty(1, dtype=dtype).expand(LOCAL, 2 * intermediate, HIDDEN)
    down = torch.empty(1, dtype=dtype).expand(LOCAL, HIDDEN, intermediate)
    of_gate_up, of_down = (
        torch.zeros(scale_shape(weights.shape)) if dtype == E4M3 else None
        for weights in (gate_up, down)
    )
    for both in chosen:
        print(both, flush=True)
        own = both.gate_up, of_gate_up, both.down.f16
        down_pairs(gate_up_pairs(rows, gate_up, routing, *own), down, routing, both.down, of_down)


def main() -> None:
    compile_attention()
    compile_routing()
    compile_gates()
    instead: dict[str, Any] = {"overlaps": lambda device: True}
    for name in ("gate_up_kernel", "down_kernel"):
        instead[name] = Compiled(getattr(experts, name))
    with patch.multiple(experts, **instead):
        for dtype in (torch.bfloat16, E4M3):
            fp8 = dtype == E4M3
            compile_experts(dtype, INTERMEDIATE, tiles(fp8))
            narrow = (choose_tiles(n, TOP_K, EXPERTS, NARROW, fp8) for n in ROWS_OF_NARROW)
            compile_experts(dtype, NARROW, narrow)


if __name__ == "__main__":
    main()
