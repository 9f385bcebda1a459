"""Times of the decode kernels, by which each shape gets the faster one.

Rows are printed by examples/benchmarks/kernels/attention_decode.py: of one shape and query length
one for few and one for many requests, if they get other tiles. Bf16 over bf16, pages of 64.
A query length between measured ones goes as the longer, for which the kernel takes less than XQA
for the shorter; one longer than all as the longest, up to MOST_ROWS. Other shapes get XQA.
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


MEASURED: tuple[Measured, ...] = (  # on an H200
    Measured(128, 8, 1, SplitTile(64, 4, 2, 3, 1),
             ((4, 16.7, 12.8), (8, 22.3, 18.0), (16, 29.6, 20.0),
              (32, 41.4, 28.3), (64, 56.8, 44.4), (128, 103.9, 85.4))),
    Measured(128, 8, 4, SplitTile(64, 4, 3, 2, 1),
             ((4, 25.7, 15.8), (8, 31.1, 20.4), (16, 39.5, 22.2),
              (32, 53.3, 31.4), (64, 71.2, 49.4), (128, 129.2, 94.1))),
    Measured(256, 8, 1, SplitTile(64, 8, 3, 1, 8),
             ((4, 27.6, 10.8), (8, 31.0, 15.2), (16, 39.5, 18.8))),
    Measured(256, 8, 1, SplitTile(64, 8, 3, 1, 1),
             ((32, 54.7, 29.5), (64, 78.0, 46.5), (128, 120.4, 88.6))),
    Measured(256, 8, 4, SplitTile(64, 8, 3, 1, 8),
             ((4, 35.7, 12.3), (8, 38.5, 19.5), (16, 48.4, 25.4))),
    Measured(256, 8, 4, SplitTile(64, 8, 3, 1, 1),
             ((32, 68.3, 35.5), (64, 94.3, 55.6), (128, 158.6, 104.2))),
    Measured(256, 16, 1, SplitTile(64, 8, 3, 1, 8),
             ((4, 28.1, 10.5), (8, 30.9, 15.9), (16, 40.2, 19.8))),
    Measured(256, 16, 1, SplitTile(64, 8, 3, 1, 1),
             ((32, 55.5, 30.9), (64, 78.4, 47.9), (128, 121.2, 91.9))),
    Measured(256, 16, 4, SplitTile(32, 4, 4, 1, 8),
             ((4, 35.7, 18.0), (8, 50.8, 20.8), (16, 68.8, 27.9))),
    Measured(256, 16, 4, SplitTile(32, 4, 4, 1, 1),
             ((32, 99.5, 36.0), (64, 138.7, 55.4), (128, 263.7, 107.3))),
)  # fmt: skip
MOST_ROWS = 64  # of a KV head, in a program: as were measured; 128 do not fit its registers


@dataclass(frozen=True)
class MeasuredTiles:
    """Chooses a tile for a spec's decodes, or None where XQA is faster or nothing was measured."""

    rows: tuple[tuple[int, Measured], ...]  # a query length, and what decides for it

    @property
    def used(self) -> tuple[tuple[int, Measured], ...]:
        return tuple((query_len, row) for query_len, row in self.rows if row.is_used)

    @classmethod
    def of(cls, spec: AttentionSpec, measured: Sequence[Measured] | None = None) -> MeasuredTiles:
        found = spec.dtype, spec.kv_dtype, spec.page_size
        if found != (torch.bfloat16, torch.bfloat16, 64):
            return cls(())
        rows = [
            row for row in (MEASURED if measured is None else measured)
            if (row.head_dim, row.group_size) == (spec.head_dim, spec.group_size)
        ]  # fmt: skip
        lengths = {row.query_len for row in rows}
        return cls(tuple(
            (query_len, row) for query_len in sorted(spec.decode_query_lens) for row in rows
            if row.query_len == _decides(query_len, lengths)
            and query_len * spec.group_size <= MOST_ROWS
        ))  # fmt: skip

    def __call__(self, query_len: int, requests: int) -> SplitTile | None:
        rows = (row for length, row in self.rows if length == query_len)
        row = min(rows, key=lambda row: row.distance(requests), default=None)
        return row.tile if row is not None and row.split_is_faster(requests) else None

    def __str__(self) -> str:
        others = [
            f"{query_len} rows as {row.query_len}"
            for query_len, row in self.used if query_len != row.query_len
        ]  # fmt: skip
        return "; ".join(dict.fromkeys([*(str(row) for _, row in self.used), *others]))


def _decides(query_len: int, measured: set[int]) -> int | None:
    if query_len < min(measured):
        return None
    return min((n for n in measured if n >= query_len), default=max(measured))
