"""Ranks: the handles of an engine's ranks, and messages to several of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Protocol, TypeVar

from collectives.awake_clock import LOOK_EVERY_S, Deadline
from dp_runtime.core.membership import Membership
from dp_runtime.errors import EngineClosed, StartError
from workers.messages import HostInfo, InProcessRendezvous, Message
from workers.start_errors import raise_failures

TOGETHER_S = 1.0  # for ranks with the same trouble to be named together

Sent = TypeVar("Sent")


class Rank(Protocol):
    dp_rank: int

    def call(self, message: Message[Sent]) -> Future[Sent]:
        """Send a message; its answer, or RankFailed if the rank's process ends first."""


class RankHandle(Rank, Protocol):
    def kill(self) -> None:
        """End the rank at once; callable more than once."""


class Launcher(Protocol):
    """Makes the ranks of one engine, whatever kind of process they are."""

    def launch(self, dp_rank: int) -> RankHandle:
        """Start a rank in the place of the one that had this number before, or a standby."""

    def make_room(self, dp_ranks: Sequence[int], timeout_s: float) -> None:
        """Reserve what ranks that are new here will run on; StartError if there is no room."""

    def give_room(self, dp_ranks: Sequence[int]) -> None:
        """Give back what these ran on, who have ended and will not be replaced."""

    def meeting(self, members: Membership) -> InProcessRendezvous | None:
        """Return a new place for these to meet, if ranks can not open one themselves."""

    def release(self) -> None:
        """Give back what the ranks ran on, once all of them have ended."""


class Seat:
    """A rank's number, which another process has once the one before is lost."""

    def __init__(self, handle: RankHandle) -> None:
        self.dp_rank = handle.dp_rank
        self.handle = handle
        self._vacant = False
        self.host: HostInfo | None = None  # of who sits, or sat, there: known once it has prepared
        self.answered = False  # who sits there now is known to have come up
        self._handing_over = threading.Lock()

    def take_over(self, handle: RankHandle, answered: bool = False) -> None:
        with self._handing_over:
            self.handle, self.answered = handle, answered

    @property
    def is_vacant(self) -> bool:
        return self._vacant

    def vacate(self) -> RankHandle:
        """Let nobody hear of its rank any more; return the rank, for somebody to end."""
        with self._handing_over:
            self._vacant = True
        return self.handle

    def if_held(self, handle: RankHandle, act: Callable[[], None]) -> None:
        """Do what a handle has news for, unless another has taken over, or the seat is vacant."""
        with self._handing_over:
            if self.handle is handle and not self._vacant:
                act()

    def call(self, message: Message[Sent]) -> Future[Sent]:
        return self.handle.call(message)


class Reserve(Protocol):
    """Standbys that can take the seats of lost ranks."""

    def take(self, seat: Seat) -> RankHandle | None:
        """Return one that has the seat's number from now on, if there is one where it is needed."""

    def close(self) -> None: ...


class Ranks:
    """The seats of an engine's ranks: of those that serve, and of others on their way in or out."""

    def __init__(self, launcher: Launcher, handles: Sequence[RankHandle], reserve: Reserve) -> None:
        self.launcher, self._reserve = launcher, reserve
        self._serving = {handle.dp_rank: Seat(handle) for handle in handles}  # never changed
        self._others: list[Seat] = []
        self._closed = False
        self._lock = threading.Lock()

    @property
    def seats(self) -> tuple[Seat, ...]:  # [position]
        return tuple(self._serving.values())

    @property
    def members(self) -> Membership:
        return Membership(tuple(self._serving))

    def seat(self, dp_rank: int) -> Seat:
        return self._serving[dp_rank]

    def replace(self, seats: Sequence[Seat]) -> None:
        """End who sits there and start others, unless the engine is closing."""
        with ThreadPoolExecutor(len(seats)) as pool:  # a device may hold a process for a while
            list(pool.map(lambda seat: seat.handle.kill(), seats))
        for seat in seats:
            standby = self._reserve.take(seat)
            with self._lock:
                if not self._closed:
                    handle = standby or self.launcher.launch(seat.dp_rank)
                    seat.take_over(handle, answered=standby is not None)
                    continue
            if standby is not None:
                standby.kill()
            self._check_open()

    def launch(self, dp_ranks: Sequence[int], timeout_s: float) -> list[Seat]:
        """Start ranks beside those that serve; StartError if there is no room for them."""
        self.launcher.make_room(dp_ranks, timeout_s)
        seats: list[Seat] = []
        try:
            for dp_rank in dp_ranks:
                with self._lock:
                    self._check_open()
                    seats.append(Seat(self.launcher.launch(dp_rank)))
                    self._others.append(seats[-1])
        except BaseException:
            self.dismiss(seats)
            self.launcher.give_room(dp_ranks)
            raise
        return seats

    def enter(self, members: Membership, joining: Sequence[Seat]) -> list[Seat]:
        """Have these serve from now on; return the seats of those that do no more, now vacant."""
        with self._lock:
            self._check_open()
            known = self._serving | {seat.dp_rank: seat for seat in joining}
            vacated = [seat for name, seat in self._serving.items() if name not in members]
            self._serving = {dp_rank: known[dp_rank] for dp_rank in members.dp_ranks}
            self._others = [*(seat for seat in self._others if seat not in joining), *vacated]
        for seat in vacated:
            seat.vacate()
        return vacated

    def dismiss(self, seats: Sequence[Seat]) -> None:
        """End ranks that do not serve, and give back their room."""
        for seat in seats:
            seat.vacate().kill()
        self.launcher.give_room([seat.dp_rank for seat in seats])
        with self._lock:
            self._others = [seat for seat in self._others if seat not in seats]

    def kill(self) -> None:
        """End all ranks, and let none be started any more."""
        with self._lock:
            self._closed = True
            seats = [*self._serving.values(), *self._others]
        self._reserve.close()
        for seat in seats:
            seat.handle.kill()

    def all(
        self,
        message: Message[Sent],
        deadline: Deadline,
        show: Callable[[], None] = lambda: None,
        seats: Sequence[Seat] = (),
        why_not: Callable[[], str] = lambda: "",
    ) -> list[Sent]:
        """Send a message to ranks; the first failures are one error that names them.

        `why_not` says why the answers are not waited for any more.
        """
        asked = {seat.dp_rank: seat.call(message) for seat in seats or self.seats}
        futures = list(asked.values())
        while not all(future.done() for future in futures) and deadline.left() > 0:
            done, _ = wait(futures, LOOK_EVERY_S, FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                wait(futures, TOGETHER_S)
                break
            if reason := why_not():
                raise StartError(f"{reason} (during {message.name!r})")
            show()
        raise_failures(message.name, asked)
        return [future.result() for future in futures]

    def _check_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")
