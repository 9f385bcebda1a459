"""The step board of the ranks of one host: records in memory that all of them map."""

from __future__ import annotations

import time
from collections.abc import Callable

from collectives.member import Group, GroupMember
from collectives.shared_memory.channel import Channel
from dp_runtime.parallel.agreement import StepRecord

LOOK_EVERY_S = 0.002
# A rank whose last wait was short looks NUM_YIELDS times before it sleeps: waking takes longer.
# Where ranks compute between turns, waits are longer, and yielding would only take time from them.
SHORT_WAIT_S = 500e-6
NUM_YIELDS = 20


class SharedMemoryBoard(GroupMember):
    """StepBoard over the records of a SharedMemoryGroup; one is there when turn and checksum are.

    The last rank to post wakes the others, and after `idle` the first does too. Two that post at
    once may each miss the other's record: they look again after LOOK_EVERY_S.
    """

    def __init__(
        self,
        group: Group,
        channel: Channel,
        dp_rank: int,
        dp_size: int,
        rouse: Callable[[], None],
        newest_record: Callable[[int], StepRecord | None],
    ) -> None:
        super().__init__(group, dp_rank, dp_size)
        self._channel = channel
        self._rouse, self._newest_record = rouse, newest_record
        self._woken = False
        self._idled = True  # peers may wait for the first record of all
        self._last_wait_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._channel.waited_s

    def all_gather_records(self, record: StepRecord) -> tuple[StepRecord, ...]:
        channel = self._channel
        with channel.in_use:
            turn = channel.begin()
            channel.region.write_record(turn, record)
            found = {self.dp_rank: record}
            last = not self._missing(turn, found)
            if last or self._idled:
                channel.bell.ring(turn)
            self._idled = False
            if last:
                channel.bell.listen(0.0)  # takes in what peers rang, or the FIFO would fill
            else:
                what = f"record of step {record.step_id}"
                yields = NUM_YIELDS if self._last_wait_s < SHORT_WAIT_S else 0
                waited = channel.waited_s
                channel.wait(what, lambda: self._missing(turn, found), LOOK_EVERY_S, yields)
                self._last_wait_s = channel.waited_s - waited
            return tuple([found[rank] for rank in range(self.dp_size)])

    def newest(self) -> tuple[StepRecord | None, ...]:
        """Return every rank's newest record without taking part; callable from any thread."""
        return tuple(self._newest_record(rank) for rank in range(self.dp_size))

    def idle(self, timeout_s: float) -> None:
        channel = self._channel
        deadline = time.monotonic() + timeout_s
        with channel.in_use:
            channel.raise_if_failed()
            self._idled = True
            while not self._woken and channel.bell.newest_turn() <= channel.turn:
                left = deadline - time.monotonic()
                channel.bell.listen(left)
                channel.raise_if_failed()
                if left <= 0:
                    break
            self._woken = False

    def wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._rouse()

    def _missing(self, turn: int, found: dict[int, StepRecord]) -> list[int]:
        missing = []
        for rank in range(self.dp_size):
            if rank not in found:
                record = self._channel.region.read_record(rank, turn)
                if record is None:
                    missing.append(rank)
                else:
                    found[rank] = record
        return missing
