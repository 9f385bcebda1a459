"""Times of the decode kernels, by which each shape gets the faster one.

Rows are printed by examples/benchmarks/kernels/attention_decode.py: of one shape and query length
one for few and one for many requests, if they get other tiles. Bf16 over bf16, pages of 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.kernels.split_tile import MAX_REQUESTS, SplitTile


@dataclass(frozen=True)
class Measured:
    """One shape of a decode or a verification, by XQA and by the split kernel with one tile."""

    head_dim: int
    group_size: int
    query_len: int
    tile: SplitTile
    times: tuple[tuple[int, float, float], ...]  # requests, microseconds of XQA and of the kernel

    def distance(self, requests: int) -> float:
        return min(_proportion(measured, requests) for measured, _, _ in self.times)

    def split_is_faster(self, requests: int) -> bool:
        """Decide as the measured number of requests does that is the nearest in proportion."""
        _, xqa, split = min(self.times, key=lambda row: _proportion(row[0], requests))
        return split < xqa and requests <= MAX_REQUESTS

    @property
    def is_used(self) -> bool:
        return any(self.split_is_faster(requests) for requests, _, _ in self.times)

    def __str__(self) -> str:
        faster = [row for row in self.times if self.split_is_faster(row[0])]
        times = ", ".join(f"{n} requests {split:.1f} us for {xqa:.1f}" for n, xqa, split in faster)
        return f"{self.query_len} row{'s' * (self.query_len > 1)} a request: {times}"


def _proportion(requests: int, others: int) -> float:
    return max(requests, others) / min(requests, others)


MEASURED: tuple[Measured, ...] = (  # on an H200; where there is no row, XQA decodes
    Measured(128, 8, 1, SplitTile(64, 4, 3, 2),
             ((16, 21.1, 22.8), (64, 50.1, 48.9), (128, 96.6, 92.4))),
    Measured(128, 8, 4, SplitTile(64, 4, 3, 2),
             ((16, 27.4, 28.6), (64, 59.3, 56.3), (128, 116.4, 101.4))),
    Measured(256, 16, 1, SplitTile(64, 8, 3, 1),
             ((16, 30.0, 25.1), (64, 68.0, 52.7), (128, 111.2, 98.3))),
)  # fmt: skip


@dataclass(frozen=True)
class MeasuredTiles:
    """Chooses a tile for a spec's decodes, or None where XQA is faster or nothing was measured."""

    rows: tuple[Measured, ...]  # those in which XQA is always faster decide, too

    @property
    def used(self) -> tuple[Measured, ...]:
        return tuple(row for row in self.rows if row.is_used)

    @classmethod
    def of(cls, spec: AttentionSpec, measured: Sequence[Measured] | None = None) -> MeasuredTiles:
        found = spec.dtype, spec.kv_dtype, spec.page_size
        if found != (torch.bfloat16, torch.bfloat16, 64):
            return cls(())
        return cls(tuple(
            row for row in (MEASURED if measured is None else measured)
            if (row.head_dim, row.group_size) == (spec.head_dim, spec.group_size)
            and row.query_len in spec.decode_query_lens
        ))  # fmt: skip

    def __call__(self, query_len: int, requests: int) -> SplitTile | None:
        rows = (row for row in self.rows if row.query_len == query_len)
        row = min(rows, key=lambda row: row.distance(requests), default=None)
        return row.tile if row is not None and row.split_is_faster(requests) else None

    def __str__(self) -> str:
        return "; ".join(map(str, self.used))
