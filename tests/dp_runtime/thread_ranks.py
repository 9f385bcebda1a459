"""Ranks as threads of the test, with the simplest row collective that can work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import TypeVar, cast

import torch
from torch import Tensor

from dp_runtime.parallel.collective import RowCollective

Result = TypeVar("Result")
TIMEOUT_S = 30


class ThreadCollective:
    """One rank's end of a RowCollective over a shared list."""

    def __init__(self, dp_rank: int, shelf: list[Tensor], barrier: threading.Barrier) -> None:
        self.dp_rank = dp_rank
        self.dp_size = len(shelf)
        self.calls: list[str] = []
        self._shelf = shelf
        self._barrier = barrier

    @property
    def row_collective(self) -> RowCollective:
        """This rank's end for an exchange, which needs no more than is here."""
        return cast(RowCollective, self)

    def all_gather(self, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        return self._meet(
            "gather", rows, counts[self.dp_rank], lambda all_rows: torch.cat(all_rows)
        )

    def reduce_scatter(self, rows: Tensor, counts: tuple[int, ...]) -> Tensor:
        start = sum(counts[: self.dp_rank])
        stop = start + counts[self.dp_rank]
        return self._meet(
            "reduce_scatter",
            rows,
            sum(counts),
            lambda parts: reduce(torch.add, [p[start:stop] for p in parts]),
        )

    def _meet(
        self, name: str, rows: Tensor, count: int, combine: Callable[[list[Tensor]], Tensor]
    ) -> Tensor:
        assert rows.shape[0] == count, f"{name}: {rows.shape[0]} rows, counts say {count}"
        self.calls.append(name)
        self._shelf[self.dp_rank] = rows
        self._barrier.wait(TIMEOUT_S)
        result = combine(self._shelf)
        self._barrier.wait(TIMEOUT_S)
        return result


def run_ranks(dp_size: int, run: Callable[[ThreadCollective], Result]) -> list[Result]:
    """What `run` returns on every rank; the first error of a rank frees the others."""
    shelf, barrier = [torch.empty(0)] * dp_size, threading.Barrier(dp_size)

    def guarded(dp_rank: int) -> Result:
        try:
            with torch.inference_mode():
                return run(ThreadCollective(dp_rank, shelf, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(dp_size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(dp_size)]
    errors = [e for e in (f.exception() for f in futures) if e is not None]
    real = [e for e in errors if not isinstance(e, threading.BrokenBarrierError)]
    for error in real or errors:
        raise error
    return [future.result() for future in futures]
