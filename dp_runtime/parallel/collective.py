"""RowCollective: how rows of a matrix travel between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Counts = tuple[int, ...]


class RowCollective(Protocol):
    """Moves rows of a matrix between ranks; all ranks call the same methods in the same order.

    All ranks pass the same `counts`, [rank]; where they sum to 0, nothing moves and nobody waits.
    Every wait ends with CollectiveTimeout, or with CollectiveAborted after an abort.
    """

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float: ...  # for peers, since the start

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """All ranks' values, equally many of each: [rank][value]."""

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        """Local rows [counts[dp_rank], hidden] -> all ranks' rows [sum(counts), hidden]."""

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        """Partial sums [sum(counts), hidden] -> local rows [counts[dp_rank], hidden], summed."""

    def barrier(self) -> None: ...

    def arm_watchdog(self, what: str) -> None:
        """Bound the device's time for work that others launched so far, as a graph's replay."""

    def raise_if_failed(self) -> None:
        """Raise CollectiveTimeout or CollectiveAborted if the collective has failed.

        On a GPU, call it once the host has waited for a result: calls return before rows move.
        """

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""

    def close(self) -> None: ...  # callable more than once


@runtime_checkable
class DeviceCountCollective(RowCollective, Protocol):
    """Also moves rows by counts that only the device knows, for graphs.

    row_ranges [2, dp_size] int32 on the device: each rank's first row among dp_size *
    rows_per_rank, and how many of its rows are real. Only real rows cross.
    """

    def all_gather_v(
        self, rows: Tensor, row_ranges: Tensor, rows_per_rank: int, poison: bool
    ) -> Tensor:
        """Local rows -> [dp_size * rows_per_rank, hidden]; not real: undefined, or poison's NaN."""

    def reduce_scatter_v(self, partial: Tensor, row_ranges: Tensor, local_rows: int) -> Tensor:
        """[dp_size * rows_per_rank, hidden] -> [local_rows, hidden], summed; not real: 0."""
