"""Row collectives and step boards for N threads of one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from collectives.awake_clock import LOOK_EVERY_S, Deadline
from collectives.member import GroupMember
from collectives.rows import check_gather, check_reduce_scatter, split, sum_in_rank_order
from dp_runtime.core.membership import Membership
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout, require
from dp_runtime.parallel.agreement import StepRecord
from dp_runtime.parallel.collective import Counts


class InProcessGroup:
    """A group of dp_size threads; every wait ends within timeout_s seconds."""

    def __init__(self, dp_size: int, timeout_s: float, members: Membership | None = None) -> None:
        require(dp_size >= 1, "dp_size", dp_size, "an integer >= 1")
        changed, self._members = threading.Condition(), members or Membership.first(dp_size)
        self._meetings = tuple(_Meeting(self._members, timeout_s, changed) for _ in range(2))
        self.dp_size = dp_size

    def collective(self, dp_rank: int) -> InProcessCollective:
        return InProcessCollective(self._rank(dp_rank), self._meetings[0], self.dp_size)

    def board(self, dp_rank: int) -> InProcessBoard:
        return InProcessBoard(self._rank(dp_rank), self._meetings[1], self.dp_size)

    def _rank(self, dp_rank: int) -> _Rank:
        return _Rank(self._meetings, dp_rank, self._members.dp_ranks[dp_rank])


class _Rank:
    def __init__(self, meetings: Sequence[_Meeting], dp_rank: int, name: int) -> None:
        self._meetings, self.dp_rank, self._name = meetings, dp_rank, name

    def raise_if_failed(self) -> None:
        for meeting in self._meetings:
            meeting.raise_if_failed(self.dp_rank)

    def abort(self, reason: str) -> None:
        for meeting in self._meetings:
            meeting.abort(f"aborted by rank {self._name}: {reason}")

    def close(self) -> None:
        for meeting in self._meetings:
            meeting.close(self.dp_rank)


class _Meeting:
    """Turns in which every rank brings a value and takes away those of all."""

    def __init__(self, members: Membership, timeout_s: float, changed: threading.Condition) -> None:
        self._members, self._timeout_s, self._changed = members, timeout_s, changed
        dp_size = members.size
        self._brought: list[list[Any]] = [[] for _ in range(dp_size)]  # not yet taken by all
        self._turns = [0] * dp_size
        self._first = 0  # turns that everyone has taken
        self._taken = [0] * dp_size
        self._broken: dict[int, str] = {}

    def meet(self, dp_rank: int, value: Any, what: str) -> tuple[tuple[Any, ...], float]:
        """Return all ranks' values of this rank's next turn, and the seconds spent waiting."""
        with self._changed:
            self.raise_if_failed(dp_rank)
            turn = self._turns[dp_rank]
            self._turns[dp_rank] = turn + 1
            self._brought[dp_rank].append(value)
            self._changed.notify_all()
            waited = self._wait(dp_rank, lambda: min(self._turns) > turn, self._timeout_s)
            missing = [rank for rank, at in enumerate(self._turns) if at <= turn]
            if missing:
                names = self._members.named(missing)
                message = f"{what}: waited {self._timeout_s:g} s for ranks {names}"
                self._broken[dp_rank] = f"timed out before ({message})"
                raise CollectiveTimeout(message)
            values = tuple(brought[turn - self._first] for brought in self._brought)
            self._taken[dp_rank] = turn + 1
            self._drop_taken()
            return values, waited

    def sleep(self, dp_rank: int, woken: Callable[[], bool], timeout_s: float) -> None:
        """Wait until woken() or until any rank has begun a turn that this rank has not."""
        with self._changed:
            self.raise_if_failed(dp_rank)
            own = self._turns[dp_rank]
            self._wait(dp_rank, lambda: woken() or max(self._turns) > own, timeout_s)

    def notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def abort(self, reason: str) -> None:
        with self._changed:
            for rank in range(self._members.size):
                self._broken.setdefault(rank, reason)
            self._changed.notify_all()

    def close(self, dp_rank: int) -> None:
        with self._changed:
            self._broken[dp_rank] = "this rank has closed its group"
            self._changed.notify_all()

    def raise_if_failed(self, dp_rank: int) -> None:
        if dp_rank in self._broken:
            raise CollectiveAborted(self._broken[dp_rank])

    def _wait(self, dp_rank: int, done: Callable[[], bool], timeout_s: float) -> float:
        start, deadline = time.monotonic(), Deadline(timeout_s)
        while not done() and dp_rank not in self._broken and (left := deadline.left()) > 0:
            self._changed.wait(min(left, LOOK_EVERY_S))
        self.raise_if_failed(dp_rank)
        return time.monotonic() - start

    def _drop_taken(self) -> None:
        while self._first < min(self._taken):
            self._first += 1
            for brought in self._brought:
                brought.pop(0)


class InProcessCollective(GroupMember):
    def __init__(self, rank: _Rank, meeting: _Meeting, dp_size: int) -> None:
        super().__init__(rank, rank.dp_rank, dp_size)
        self._meeting = meeting
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._waited_s

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        return self._meet(tuple(values), "all_gather_ints")

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        if sum(counts) == 0:
            return rows.clone()
        # A copy, since the caller may write to its rows as soon as this returns.
        return torch.cat(self._meet(rows.clone(), "all_gather"))

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        check_reduce_scatter(rows, counts, self.dp_size)
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        if sum(counts):
            parts = self._meet(rows.clone(), "reduce_scatter")
            sum_in_rank_order([split(part, counts)[self.dp_rank] for part in parts], out)
        return out

    def barrier(self) -> None:
        self._meet(None, "barrier")

    def arm_watchdog(self, what: str) -> None:
        pass  # the host waits for every call

    def _meet(self, value: Any, what: str) -> tuple[Any, ...]:
        values, waited = self._meeting.meet(self.dp_rank, value, what)
        self._waited_s += waited
        return values


class InProcessBoard(GroupMember):
    def __init__(self, rank: _Rank, meeting: _Meeting, dp_size: int) -> None:
        super().__init__(rank, rank.dp_rank, dp_size)
        self._meeting = meeting
        self._woken = False
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._waited_s

    def all_gather_records(self, record: StepRecord) -> tuple[StepRecord, ...]:
        what = f"record of step {record.step_id}"
        records, waited = self._meeting.meet(self.dp_rank, record, what)
        self._waited_s += waited
        return records

    def idle(self, timeout_s: float) -> None:
        self._meeting.sleep(self.dp_rank, lambda: self._woken, timeout_s)
        self._woken = False

    def wake(self) -> None:
        self._woken = True
        self._meeting.notify()
