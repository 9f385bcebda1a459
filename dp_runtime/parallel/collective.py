"""RowCollective: how rows of a matrix travel between ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

Counts = tuple[int, ...]  # [rank]; where they sum to 0, nothing moves and nobody waits


class RowCollective(Protocol):
    """Moves rows between ranks, which make the same calls in the same order with the same counts.

    Every wait ends with CollectiveTimeout, or with CollectiveAborted after an abort.
    """

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float: ...  # for peers, since the start

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """Return all ranks' values, equally many of each: [rank][value]."""

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        """Return all ranks' rows [sum(counts), hidden]; rows: [counts[dp_rank], hidden]."""

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        """Return the sums of local rows [counts[dp_rank], hidden]; rows: [sum(counts), hidden]."""

    def barrier(self) -> None: ...

    def arm_watchdog(self, what: str) -> None:
        """Bound the device's time for work that others launched so far, as a graph's replay."""

    def raise_if_failed(self) -> None:
        """Raise what failed. NOTE: on a GPU, rows move after a call; wait for a result first."""

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""

    def close(self) -> None: ...  # callable more than once


@runtime_checkable
class DeviceCountCollective(RowCollective, Protocol):
    """Also moves rows by PaddingPlan.row_ranges on the device, so that only real rows cross.

    most_rows: that one rank has, whatever row_ranges say.
    """

    def reserve(self, rows_per_rank: int, row_bytes: int) -> None:
        """Make room for all rows to come: graphs captured before and after would not meet."""

    def all_gather_v(
        self, rows: Tensor, row_ranges: Tensor, total_rows: int, most_rows: int, poison: bool
    ) -> Tensor:
        """Return [total_rows, hidden]; rows not real: undefined, or poison's NaN."""

    def reduce_scatter_v(
        self, partial: Tensor, row_ranges: Tensor, out: Tensor, most_rows: int
    ) -> None:
        """Sum into out [local_rows, hidden], 0 where not real; partial: as all_gather_v returns."""
