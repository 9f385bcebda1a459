"""RowCollective: how rows of a matrix travel between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Counts = tuple[int, ...]


class RowCollective(Protocol):
    """Moves rows of a matrix between ranks; all ranks call the same methods in the same order.

    `counts` are known to every rank alike. Every wait ends within the implementation's timeout
    with CollectiveTimeout, or with CollectiveAborted after an abort. Nothing moves, and nobody
    waits, where the counts sum to 0.
    """

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float:
        """Seconds this rank has spent waiting for peers, since the start."""

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """All ranks' values (equally many on each rank), [rank][value]."""

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        """Own rows [counts[dp_rank], hidden] -> all ranks' rows [sum(counts), hidden]."""

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        """Partial sums [sum(counts), hidden] -> own rows [counts[dp_rank], hidden], summed."""

    def barrier(self) -> None:
        """Return once all ranks have called it."""

    def arm_watchdog(self, what: str) -> None:
        """Bound the device's wait for what was launched so far without this object's doing.

        A graph's replay is such a launch. Nothing to do where the host waits for every call.
        """

    def raise_if_failed(self) -> None:
        """Raise CollectiveTimeout or CollectiveAborted if the collective has failed.

        Rows may still move after a call has returned (on a GPU): once the host has waited for
        what was computed from them, this tells whether it is worth anything.
        """

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""

    def close(self) -> None:
        """Release what this rank holds; callable more than once."""


@runtime_checkable
class DeviceCountCollective(RowCollective, Protocol):
    """A RowCollective that also moves rows by counts which only the device knows, for graphs.

    row_ranges [2, dp_size] int32 on the device: each rank's first row among all ranks' rows, of
    which there are rows_per_rank for each rank, and how many are real. Only these cross.
    """

    def all_gather_v(
        self, rows: Tensor, row_ranges: Tensor, rows_per_rank: int, poison: bool
    ) -> Tensor:
        """Own rows [own <= rows_per_rank, hidden] -> [dp_size * rows_per_rank, hidden], all ranks'.

        Those that are not real are undefined, or NaN with poison.
        """

    def reduce_scatter_v(self, partial: Tensor, row_ranges: Tensor, own_rows: int) -> Tensor:
        """Partial sums [dp_size * rows_per_rank, hidden] -> own rows [own_rows, hidden], summed.

        Those that are not real are 0.
        """
