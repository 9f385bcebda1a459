"""StepBoard: where ranks post their step records."""

from __future__ import annotations

from typing import Protocol

from dp_runtime.parallel.agreement import StepRecord


class StepBoard(Protocol):
    """Each rank posts its records and reads everyone's, from one thread."""

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float: ...  # for peers' records, since the start

    def all_gather_records(self, record: StepRecord) -> tuple[StepRecord, ...]:
        """Post a record, and return what all ranks posted in the same turn, [rank].

        The board counts turns, so that records which differ in epoch, step or program still meet.
        Raises CollectiveTimeout naming the ranks that are missing.
        """

    def idle(self, timeout_s: float) -> None:
        """Sleep until `wake`, a peer's next record, or the timeout.

        All ranks call it after the same records: the next to post then knows that others sleep.
        """

    def wake(self) -> None:
        """End this rank's current or next `idle`; callable from any thread."""

    def abort(self, reason: str) -> None:
        """As RowCollective.abort."""

    def close(self) -> None: ...  # callable more than once
