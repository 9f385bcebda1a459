"""StepBoard: where ranks post their step records."""

from __future__ import annotations

from typing import Protocol

from dp_runtime.parallel.agreement import StepRecord


class StepBoard(Protocol):
    """Gathers records by turns that it counts itself: records of unequal steps still meet."""

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float: ...  # for peers' records, since the start

    def all_gather_records(self, record: StepRecord) -> tuple[StepRecord, ...]:
        """Return all ranks' records of this turn, [rank]; CollectiveTimeout names missing ranks."""

    def idle(self, timeout_s: float) -> None:
        """Sleep until `wake`, a peer's next record, or the timeout.

        NOTE: all ranks call it after the same records, so that the next to post wakes the others.
        """

    def wake(self) -> None:
        """End this rank's current or next `idle`; callable from any thread."""

    def abort(self, reason: str) -> None: ...  # as RowCollective's

    def close(self) -> None: ...  # callable more than once
