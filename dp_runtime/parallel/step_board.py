"""StepBoard: where ranks post their step records."""

from __future__ import annotations

from typing import Protocol

from dp_runtime.parallel.agreement import StepRecord


class StepBoard(Protocol):
    """Where ranks post their step records and read everyone's; one reader thread per rank."""

    dp_rank: int
    dp_size: int

    @property
    def waited_s(self) -> float:
        """Seconds this rank has spent waiting for peers' records, since the start."""

    def all_gather_records(self, record: StepRecord) -> tuple[StepRecord, ...]:
        """Post this rank's next record and return the records all ranks posted in that turn.

        Turns are counted by the board, so that records which differ in epoch, step or program
        still meet. Raises CollectiveTimeout naming the ranks that are missing.
        """

    def idle(self, timeout_s: float) -> None:
        """Sleep until `wake`, until a peer posts its next record, or for timeout_s at most.

        All ranks call it after the same exchanges, if only for 0 seconds: the first rank to post
        again then knows that others sleep.
        """

    def wake(self) -> None:
        """End this rank's current or next `idle`; callable from any thread."""

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""

    def close(self) -> None:
        """Release what this rank holds; callable more than once."""
