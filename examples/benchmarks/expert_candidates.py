"""Tiles of the expert kernels that may be good, compiled and loaded in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context

import torch

from dp_runtime.kernels.expert_tiles import FLAT, Tile
from dp_runtime.kernels.experts import down_pairs, gate_up_pairs
from dp_runtime.kernels.moe_router import Routing
from examples.benchmarks.moe_stage import EXPERTS, HIDDEN, SHAPES, TOP_K

SHARED_MEMORY = 227 << 10  # bytes that a program may have on capability 9.0


def candidates(tokens: int, halves: int) -> Iterator[Tile]:
    """Tiles that may be good and fit into shared memory and registers; halves: 2 for gate-up."""
    per_expert = tokens * TOP_K / EXPERTS
    if per_expert <= 64:
        blocks_m = [m for m in (16, 32, 64) if per_expert / 2 <= m <= max(16, 2 * per_expert)]
        for m, n, k, warps, stages, tma in product(
            blocks_m, (64, 128), (64, 128), (4, 8), (3, 5), (False, True)
        ):
            if _resident(m, n * halves, k, warps, stages):
                yield Tile(m, n, k, warps, stages, tma)
    if per_expert > 12:
        wide = per_expert > 64
        blocks_m = [64, 128] if wide else [32, 64, 128]
        for m, n, warps, stages in product(blocks_m, (64, 128, 256), (4, 8), (3, 4, 5)):
            resident = _resident(m, n * halves, 64, warps, stages)
            if resident and m * n * halves >= 64 * 128 and (stages >= 4 or resident == 2):
                yield Tile(m, n, 64, warps, stages, True, FLAT)
                yield Tile(m, n, 64, warps, stages, True, resident)


def _resident(m: int, n: int, k: int, warps: int, stages: int) -> int:
    """How many programs a multiprocessor holds at once: 0, 1, or 2 and more."""
    shared = stages * (m + n) * k * 2 + 1024
    sums = m * n // (32 * warps)  # registers of a thread
    if shared > SHARED_MEMORY or not 2 <= sums <= 128:
        return 0
    registers = (sums + 100) * 32 * warps
    return min(2, SHARED_MEMORY // shared, max(1, 65536 // registers))


@dataclass(frozen=True)
class Job:
    """One kernel with one tile; how many programs are started is not compiled in."""

    shape: str
    halves: int  # 2: gate-up, 1: down
    tile: Tile

    @classmethod
    def for_tile(cls, shape: str, halves: int, tile: Tile) -> Job:
        return cls(
            shape, halves, tile if tile.by_expert else replace(tile, per_multiprocessor=FLAT)
        )


def compile_all(shape: str, tokens: Sequence[int], num_workers: int, seconds: float) -> set[Job]:
    """Those that compile and load within so many seconds."""
    jobs = {
        Job.for_tile(shape, halves, tile): None
        for count in tokens
        for halves in (2, 1)
        for tile in candidates(count, halves)
    }
    context = get_context("forkserver")  # a forked process could not use the parent's CUDA
    context.set_forkserver_preload(["torch", "triton"])
    pool = ProcessPoolExecutor(num_workers, context)
    start, done = time.monotonic(), set[Job]()
    futures = {pool.submit(compile_one, job): job for job in jobs}
    try:
        for future in as_completed(futures, timeout=seconds):
            problem = future.result()
            if problem:
                print(f"skipped {futures[future]}: {problem}", flush=True)
            else:
                done.add(futures[future])
    except (TimeoutError, BrokenExecutor) as error:
        print(f"{type(error).__name__}: what is not compiled yet is skipped", flush=True)
    pool.shutdown(cancel_futures=True)
    taken = time.monotonic() - start
    print(f"{shape}: {len(done)} of {len(jobs)} compiled in {taken:.0f} s", flush=True)
    return done


def compile_one(job: Job) -> str:
    """Run a kernel over no pair, which compiles it into Triton's cache: what went wrong, or ""."""
    try:
        num_local, intermediate = SHAPES[job.shape]
        rows = torch.zeros(1, HIDDEN, dtype=torch.bfloat16, device="cuda")
        routing = Routing(
            weights=torch.zeros(1, TOP_K, device="cuda"),
            local_ids=torch.full((1, TOP_K), -1, dtype=torch.int32, device="cuda"),
            counts=torch.zeros(num_local, dtype=torch.int32, device="cuda"),
            pairs=torch.zeros(num_local, 1, dtype=torch.int32, device="cuda"),
        )
        if job.halves == 2:
            weights = rows.new_empty(1).expand(num_local, 2 * intermediate, HIDDEN)
            gate_up_pairs(rows, weights, routing, job.tile)
        else:
            weights = rows.new_empty(1).expand(num_local, HIDDEN, intermediate)
            down_pairs(rows.new_zeros(TOP_K, intermediate), weights, routing, job.tile)
        torch.cuda.synchronize()
    except Exception as error:  # a compiler's or a driver's, of any kind: the candidate is out
        return f"{type(error).__name__}: {error}".splitlines()[0][:160]
    return ""
