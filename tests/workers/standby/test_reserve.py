"""The reserve of standbys, over ranks that are no processes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.errors import RankFailed
from dp_runtime.metrics.status import RankHealth, RankState
from tests.workers.leftovers import wait_until
from workers.messages import NO_RANK, HostInfo, Message, TakeSeat
from workers.ranks import Seat
from workers.standby import reserve as module
from workers.standby.reserve import StandbyReserve


class FakeProcess:
    """Answers as a standby of a host, until it ends; while it is silent it answers nothing."""

    def __init__(self, dp_rank: int, host: str = "a") -> None:
        self.dp_rank, self.host = dp_rank, host
        self.ended = self.silent = False
        self.refuses = False
        self.killed = 0
        self.taken: list[TakeSeat] = []

    def call(self, message: Message[Any]) -> Future[Any]:
        future: Future[Any] = Future()
        if self.ended:
            future.set_exception(RankFailed("the process of a standby ended (SIGKILL)"))
        elif not self.silent:
            self._answer(message, future)
        return future

    def _answer(self, message: Message[Any], future: Future[Any]) -> None:
        match message.name:
            case "warm":
                future.set_result(self.host)
            case "readhealth":
                future.set_result(RankHealth(NO_RANK, RankState.READY))
            case "takeseat" if self.refuses:
                future.set_exception(RankFailed("no such GPU"))
            case "takeseat":
                assert isinstance(message, TakeSeat)
                self.taken.append(message)
                future.set_result(None)

    def kill(self) -> None:
        self.killed += 1
        self.ended = True


class FakeLauncher:
    def __init__(self) -> None:
        self.launched: list[FakeProcess] = []
        self.fails = 0

    def launch(self, dp_rank: int) -> FakeProcess:
        assert dp_rank == NO_RANK
        if self.fails:
            self.fails -= 1
            raise OSError("too many processes")
        self.launched.append(FakeProcess(dp_rank))
        return self.launched[-1]

    def make_room(self, dp_ranks: Any, timeout_s: float) -> None: ...

    def give_room(self, dp_ranks: Any) -> None: ...

    def meeting(self, members: Membership) -> None: ...

    def release(self) -> None: ...


@contextmanager
def reserve_of(
    count: int, busy: Callable[[], bool] = lambda: False, fails: int = 0
) -> Iterator[tuple[StandbyReserve, FakeLauncher]]:
    launcher = FakeLauncher()
    launcher.fails = fails
    config = EngineConfig("x", launcher="local", standby_ranks=count, hang_timeout_s=0.1)
    reserve = StandbyReserve(config, launcher, busy)
    reserve.begin()
    try:
        yield reserve, launcher
    finally:
        reserve.close()
        assert all(one.killed or one.taken for one in launcher.launched)


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOST_PAUSE_S", 0.01)
    monkeypatch.setattr(module, "WELL_S", 0.2)
    monkeypatch.setattr(module, "QUIET_S", 0.1)
    monkeypatch.setattr(module, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(module, "BEAT_S", 0.1)
    monkeypatch.setattr("workers.supervision.watch.MIN_SILENCE_S", 0.5)


def seat_on(host: str | None, gpu: str = "") -> Seat:
    seat = Seat(FakeProcess(2))
    seat.host = None if host is None else HostInfo(2, host, gpu=gpu)
    return seat


def test_a_standby_takes_a_seat_of_its_host_and_another_is_started() -> None:
    with reserve_of(1) as (reserve, launcher):
        wait_until(lambda: reserve.num_warm == 1, "a standby")
        assert reserve.take(seat_on("b")) is None
        assert reserve.take(seat_on(None)) is None
        handle = reserve.take(seat_on("a", "GPU-1"))
        assert handle is launcher.launched[0]
        assert (handle.dp_rank, launcher.launched[0].taken) == (2, [TakeSeat(2, "GPU-1")])
        wait_until(lambda: len(launcher.launched) == 2, "its successor")
        assert not launcher.launched[0].killed


def test_one_that_is_silent_or_refuses_is_ended_and_the_next_taken() -> None:
    with reserve_of(3) as (reserve, launcher):
        wait_until(lambda: reserve.num_warm == 3, "three standbys")
        silent, refusing, well = launcher.launched[:3]
        silent.silent, refusing.refuses = True, True
        assert reserve.take(seat_on("a")) is well
        assert (silent.killed, refusing.killed, well.killed) == (1, 1, 0)


def test_one_that_dies_or_hangs_is_replaced() -> None:
    with reserve_of(1) as (reserve, launcher):
        wait_until(lambda: reserve.num_warm == 1, "a standby")
        launcher.launched[0].ended = True
        wait_until(lambda: len(launcher.launched) == 2, "its successor")
        launcher.launched[1].silent = True
        wait_until(lambda: len(launcher.launched) == 3, "the successor of one that hangs")
        assert launcher.launched[1].killed


def test_a_start_that_fails_is_tried_again() -> None:
    with reserve_of(1, fails=2) as (reserve, launcher):
        wait_until(lambda: reserve.num_warm == 1, "a standby")
        assert len(launcher.launched) == 1


def test_none_is_started_while_the_ranks_recover() -> None:
    recovering = threading.Event()
    recovering.set()
    looked: list[bool] = []

    def busy() -> bool:
        looked.append(True)
        return recovering.is_set()

    with reserve_of(1, busy) as (_, launcher):
        wait_until(lambda: len(looked) > 3, "some looks")
        assert not launcher.launched
        recovering.clear()
        wait_until(lambda: len(launcher.launched) == 1, "a standby")
