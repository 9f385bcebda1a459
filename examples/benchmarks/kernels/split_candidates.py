"""Tiles of the attention kernel over shares of keys that may be good, and how one is compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.kernels.split_attention import split_attention
from dp_runtime.kernels.split_tile import SplitTile
from examples.benchmarks.kernels.trials import SHARED_MEMORY

PROGRAMS = {4: (4, 3, 2), 8: (2, 2, 1)}  # by warps and key values of a block: 4096, 8192, 16384
CUTS = {  # by head_dim: block, warps, stages
    128: ((64, 4, 3), (64, 4, 2), (32, 4, 4)),
    256: ((64, 8, 3), (32, 4, 4)),
}
PARTS = 1, 8


def candidates(spec: AttentionSpec, query_len: int) -> Iterator[SplitTile]:
    """As many programs as fit a multiprocessor at once, and one less."""
    for cut in CUTS[spec.head_dim]:
        most = _resident(spec, query_len, *cut)
        for programs, parts in product(sorted({most, most - 1} - {0}), PARTS):
            yield SplitTile(*cut, programs, parts)


def _resident(spec: AttentionSpec, query_len: int, block: int, warps: int, stages: int) -> int:
    """How many programs a multiprocessor holds, by shared memory and by registers of Triton 3.6."""
    rows, size = max(16, query_len * spec.group_size), spec.dtype.itemsize
    read_ahead = (stages - 1) * 2 * block * spec.head_dim * size
    shared = read_ahead + rows * (spec.head_dim + 2 * block) * size + 1024
    by_registers = PROGRAMS[warps][block * spec.head_dim // 8192]
    return min(SHARED_MEMORY // shared, by_registers)


@dataclass(frozen=True)
class Job:
    """A kernel with one tile; how many programs it has is not compiled in."""

    spec: AttentionSpec
    query_len: int
    tile: SplitTile

    @classmethod
    def of(cls, spec: AttentionSpec, query_len: int, tile: SplitTile) -> Job:
        return cls(spec, query_len, replace(tile, per_multiprocessor=1))


def compile_one(job: Job) -> None:
    """Run it over one request, which compiles it."""
    spec, device = job.spec, torch.device("cuda", 0)
    q = torch.zeros(job.query_len, spec.num_heads, spec.head_dim, dtype=spec.dtype, device=device)
    pool = q.new_zeros(2, 2, spec.num_kv_heads, spec.page_size, spec.head_dim)
    table = torch.ones(1, 1, dtype=torch.int32, device=device)
    own = q, pool, table, table[0] * job.query_len, 1.0, torch.empty_like(q), job.tile
    split_attention(*own)
    torch.cuda.synchronize()
