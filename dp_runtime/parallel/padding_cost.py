"""The cost of padded and ragged collectives, measured at start."""

from __future__ import annotations

from time import perf_counter_ns

import torch

from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.padding import PaddingCost

PROBE_ROWS = (16, 256)
PROBE_ROUNDS = 5


def measure_padding_cost(
    collective: RowCollective, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> PaddingCost:
    """Time even and uneven exchanges of two sizes; the slowest rank's figures count everywhere."""
    size = collective.dp_size
    even = [_time(collective, (rows,) * size, hidden_size, dtype, device) for rows in PROBE_ROWS]
    # One rank has a row more, the last as many less: the same bytes, but uneven.
    uneven = [
        _time(collective, (rows + 1, *(rows,) * (size - 2), rows - 1), hidden_size, dtype, device)
        if size > 1
        else times
        for rows, times in zip(PROBE_ROWS, even, strict=True)
    ]
    worst = [
        max(times) for times in zip(*collective.all_gather_ints([*even, *uneven]), strict=True)
    ]
    span = (PROBE_ROWS[1] - PROBE_ROWS[0]) * size
    even_slope = max(0, worst[1] - worst[0]) // span
    uneven_slope = max(0, worst[3] - worst[2]) // span
    return PaddingCost(
        max_len_base=worst[0] - even_slope * PROBE_ROWS[0] * size,
        max_len_per_row=even_slope,
        ragged_base=worst[2] - uneven_slope * PROBE_ROWS[0] * size,
        ragged_per_row=uneven_slope,
    )


def _time(
    collective: RowCollective,
    counts: tuple[int, ...],
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Measure the median nanoseconds of a gather and a reduce-scatter with these counts."""
    rows = torch.zeros((counts[collective.dp_rank], hidden_size), dtype=dtype, device=device)
    times = []
    for _ in range(PROBE_ROUNDS):
        collective.barrier()
        start = perf_counter_ns()
        collective.reduce_scatter(collective.all_gather(rows, counts), counts).sum().item()
        times.append(perf_counter_ns() - start)
    return sorted(times)[PROBE_ROUNDS // 2]
