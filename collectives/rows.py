"""Checking, cutting and summing rows, as every collective does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dp_runtime.parallel.collective import Counts


def check_gather(rows: Tensor, counts: Counts, dp_rank: int, dp_size: int) -> None:
    assert len(counts) == dp_size, f"{len(counts)} counts for {dp_size} ranks"
    assert rows.shape[0] == counts[dp_rank], (
        f"rank {dp_rank} gathers {rows.shape[0]} rows, counts say {counts[dp_rank]}"
    )


def check_reduce_scatter(rows: Tensor, counts: Counts, dp_size: int) -> None:
    assert len(counts) == dp_size, f"{len(counts)} counts for {dp_size} ranks"
    assert rows.shape[0] == sum(counts), (
        f"{rows.shape[0]} rows of partial sums, counts {counts} need {sum(counts)}"
    )


def cut(size: int, chunk: int, num_chunks: int) -> slice:
    """Return a chunk of num_chunks almost equal ones, each at most ceil(size / num_chunks)."""
    return slice(size * chunk // num_chunks, size * (chunk + 1) // num_chunks)


def sum_in_rank_order(parts: Sequence[Tensor], out: Tensor) -> None:
    """Add rank after rank, half types in float32, so that every run gives the same bits."""
    dtype = summing_dtype(out.dtype)
    total = out if dtype == out.dtype else torch.empty_like(out, dtype=dtype)
    total.copy_(parts[0])
    for part in parts[1:]:
        total += part
    if total is not out:
        out.copy_(total)


def summing_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def split(flat: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(flat, list(sizes))
