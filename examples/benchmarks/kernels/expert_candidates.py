"""Tiles of the expert kernels that may be good, compiled and loaded in processes of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.expert_tiles import FLAT, Tile, choose_tiles
from dp_runtime.kernels.experts import Activated, down_pairs, gate_up_pairs
from dp_runtime.kernels.moe_router import Routing
from dp_runtime.weights.fp8_blocks import BLOCK, scale_shape
from examples.benchmarks.kernels.moe_stage import SHAPES, Shard
from examples.benchmarks.kernels.parallel_builds import compile_all as compile_in_processes
from examples.benchmarks.kernels.trials import SHARED_MEMORY


def candidates(shard: Shard, tokens: int, halves: int, fp8: bool) -> Iterator[Tile]:
    """Tiles that may be good and fit into shared memory and registers; halves: 2 for gate-up."""
    per_expert = tokens * shard.top_k / shard.num_experts
    for tile in dict.fromkeys((_for_e4m3 if fp8 else _for_bf16)(per_expert, halves)):
        resident = _resident(tile, halves, fp8)
        if resident == 0 or not _fills(tile):
            continue
        if tile.by_expert:
            yield tile
        elif fp8 or (
            tile.block_m * tile.block_n * halves >= 64 * 128
            and (tile.num_stages >= 4 or resident >= 2)
        ):
            yield tile
            yield replace(tile, per_multiprocessor=resident)


def _for_bf16(per_expert: float, halves: int) -> Iterator[Tile]:
    if per_expert <= 48:
        blocks_m = [m for m in (16, 32, 64) if per_expert / 2 <= m <= max(16, 2 * per_expert)]
        for m, n, k, warps, stages, tma, swap in product(
            blocks_m, (64, 128), (64, 128), (4, 8), (3, 5), (False, True), (False, True)
        ):
            yield Tile(m, n, k, warps, stages, tma, swap=swap)
    if per_expert > 12:
        blocks_m = [32, 64, 128] if per_expert <= 48 else [64, 128]
        for m, warps, stages in product(blocks_m, (4, 8), (3, 4, 5)):
            plain = Tile(m, 128, 64, warps, stages, True, FLAT)
            for tile in [plain, replace(plain, joint=True)][:halves]:
                yield tile
                if m == 128:  # 32 rows take instructions of a smaller kind
                    yield from (replace(tile, rest=64), replace(tile, rest=32))


def _for_e4m3(per_expert: float, halves: int) -> Iterator[Tile]:
    """Fewer: what is wide, scaled or not swapped is left out where no measurement was good."""
    if per_expert <= 24:
        yield from _for_few_in_e4m3(per_expert, halves)
    if per_expert > 12:
        blocks_m = [64, 128] if per_expert > 48 else [32, 64]
        for m, n, k, stages in product(blocks_m, (64, 128), (64, 128), (3, 4)):
            tile = Tile(m, n, k, 4, stages, True, FLAT, True, True, True)
            yield tile
            if stages == 3 and n == 128:
                yield replace(tile, num_warps=8)
            if stages == 3 and m > 32:
                yield from (replace(tile, regroup=False), replace(tile, f16=False))


def _for_few_in_e4m3(per_expert: float, halves: int) -> Iterator[Tile]:
    m = 16 if per_expert <= 12 else 32
    for n, k, stages in product((64, 128), (64, 128), (3, 4, 5)):
        tile = Tile(m, n, k, 4, stages, True, swap=True, regroup=True, f16=True)
        yield tile
        if n == k == 128:
            yield replace(tile, num_warps=8)
        if stages != 5:
            yield replace(tile, per_multiprocessor=FLAT)
    if m == 16:
        for n, stages in product((64, 128)[: 3 - halves], (3, 5)):
            yield Tile(m, n, 128, 4, stages, False)


def _fills(tile: Tile) -> bool:
    """Whether four warps have 64 rows of a swapped product, or all warps 32 pairs."""
    full = tile.num_warps * 16 <= tile.block_n or tile.block_m >= 32
    return not tile.swap or (tile.tma and tile.block_n <= 128 and full)


def _resident(tile: Tile, halves: int, fp8: bool) -> int:
    """How many programs a multiprocessor holds at once, up to 4; 0: it holds none."""
    m, n, k = tile.block_m, tile.block_n * halves, tile.block_k
    shared = tile.num_stages * (2 * m + (1 if fp8 else 2) * n) * k + 1024
    threads = 32 * tile.num_warps
    sums = m * n // threads  # registers of a thread
    if shared > SHARED_MEMORY or not 2 <= sums <= 128:
        return 0
    if fp8 and sums > 64 and (k > 64 or halves == 1):
        return 0  # with each step's own sums beside them, registers spill
    registers = ((2 if fp8 else 1) * sums + 100) * threads
    return min(4, SHARED_MEMORY // shared, max(1, 65536 // registers))


@dataclass(frozen=True)
class Job:
    """One kernel with one tile; how many programs are started is not compiled in."""

    shape: str
    halves: int  # 2: gate-up, 1: down
    tile: Tile
    fp8: bool

    @classmethod
    def for_tile(cls, shape: str, halves: int, tile: Tile, fp8: bool) -> Job:
        if not tile.by_expert:
            tile = replace(tile, per_multiprocessor=FLAT)
        return cls(shape, halves, tile, fp8)


def compile_all(
    shape: str, tokens: Sequence[int], fp8: bool, in_use: bool, num_workers: int, seconds: float
) -> set[Job]:
    """Compile and load tiles in use, and candidates too if not in_use, within so many seconds."""
    jobs = dict[Job, None]()
    shard = SHAPES[shape]
    for count in tokens:
        chosen = choose_tiles(count, shard.top_k, shard.num_experts, shard.intermediate, fp8)
        for halves, used in ((2, chosen.gate_up), (1, chosen.down)):
            others = () if in_use else candidates(shard, count, halves, fp8)
            jobs |= {Job.for_tile(shape, halves, t, fp8): None for t in (used, *others)}
    print(shape, end=": ", flush=True)
    return compile_in_processes(jobs, compile_one, num_workers, seconds)


def compile_one(job: Job) -> None:
    """Run a kernel over no pair, which compiles it into Triton's cache."""
    shard = SHAPES[job.shape]
    num_local, hidden, top_k = shard.num_local, shard.hidden, shard.top_k
    rows = torch.zeros(1, hidden, dtype=torch.bfloat16, device="cuda")
    routing = Routing(
        weights=torch.zeros(1, top_k, device="cuda"),
        local_ids=torch.full((1, top_k), -1, dtype=torch.int32, device="cuda"),
        counts=torch.zeros(num_local, dtype=torch.int32, device="cuda"),
        pairs=torch.zeros(num_local, 1, dtype=torch.int32, device="cuda"),
    )
    inner = (2 * shard.intermediate, hidden) if job.halves == 2 else (hidden, shard.intermediate)
    dtype = E4M3 if job.fp8 else rows.dtype
    weights = torch.empty(1, dtype=dtype, device="cuda").expand(num_local, *inner)
    scales = torch.zeros(scale_shape(weights.shape), device="cuda") if job.fp8 else None
    if job.halves == 2:
        gate_up_pairs(rows, weights, routing, job.tile, scales, with_peaks=job.tile.f16)
    else:
        activated = rows.new_zeros(top_k, shard.intermediate)
        blocks = max(1, shard.intermediate // BLOCK)
        peaks = torch.zeros(top_k, blocks, device="cuda") if job.fp8 else None
        down_pairs(Activated(activated, peaks), weights, routing, job.tile, scales)
    torch.cuda.synchronize()
