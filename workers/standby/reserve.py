"""StandbyReserve: keeps warm processes at hand, and gives them the seats of lost ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass

from collectives.awake_clock import LOOK_EVERY_S, AwakeClock
from dp_runtime.config import EngineConfig
from dp_runtime.metrics.status import RankHealth
from workers.messages import NO_RANK, ReadHealth, TakeSeat, Warm
from workers.ranks import Launcher, RankHandle, Seat
from workers.supervision.watch import BEAT_S, SilenceLimits

WELL_S = 0.5  # for a standby to show that it is well
TAKE_S = 10.0  # for one that warms up to be warm, and for it to take a seat
QUIET_S = 1.0  # after a recovery, until new standbys may cost the ranks time
LOST_PAUSE_S = 1.0  # after one was lost, doubled for each that follows ...
MAX_LOST_PAUSE_S = 60.0  # ... up to this, and forgotten after twice as long
END_S = 5.0

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Standby:
    handle: RankHandle
    host: Future[str]  # once it is warm
    answered_at: float
    question: Future[RankHealth] | None = None
    comes_up: bool = True  # it has no host yet

    def beat(self, now: float, limits: SilenceLimits) -> str:
        """Say why it is lost, if it is; else ask again a while after its last answer."""
        if self.question is not None and self.question.done():
            if error := self.question.exception():
                return str(error)
            self.question, self.answered_at = None, now
        if self.comes_up and self.host.done():
            self.comes_up, self.answered_at = False, now
            if error := self.host.exception():
                return str(error)
            _log.info("a standby waits, warm, on %s", self.host.result())
        silent = now - self.answered_at
        if self.question is None and silent >= BEAT_S:
            self.question = self.handle.call(ReadHealth())
        limit = limits.first if self.comes_up else limits.later
        return f"it has not answered for {silent:.1f} s" if silent > limit else ""

    @property
    def is_warm(self) -> bool:
        return self.host.done() and self.host.exception() is None


class StandbyReserve:
    """Starts standbys in a thread of its own, but not while `busy`, and replaces those that end."""

    def __init__(self, config: EngineConfig, launcher: Launcher, busy: Callable[[], bool]) -> None:
        self._config, self._launcher, self._busy = config, launcher, busy
        self._limits = SilenceLimits.while_serving(config)
        self._standbys: list[_Standby] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._clock = AwakeClock()
        self._due, self._pause_s, self._lost_at = 0.0, LOST_PAUSE_S, 0.0
        self._thread = threading.Thread(target=self._run, name="standbys", daemon=True)

    @property
    def num_warm(self) -> int:
        with self._lock:
            return sum(standby.is_warm for standby in self._standbys)

    def begin(self) -> None:
        if self._config.standby_ranks:
            self._thread.start()

    def take(self, seat: Seat) -> RankHandle | None:
        host = seat.host
        while host is not None and (standby := self._next(host.host)):
            handle = standby.handle
            try:
                handle.call(ReadHealth()).result(WELL_S)
                handle.call(TakeSeat(seat.dp_rank, host.gpu)).result(TAKE_S)
            except (RuntimeError, TimeoutError) as error:
                _log.warning("rank %d: a standby can not take its seat: %r", seat.dp_rank, error)
                handle.kill()
            else:
                handle.dp_rank = seat.dp_rank
                _log.info("rank %d: a standby takes its seat", seat.dp_rank)
                return handle
        return None

    def close(self) -> None:
        self._over.set()
        with self._lock:
            standbys, self._standbys = self._standbys, []
        for standby in standbys:
            standby.handle.kill()
        if self._thread.is_alive():
            self._thread.join(END_S)

    def _next(self, host: str) -> _Standby | None:
        """Take a warm one of this host out of the reserve, or the first that will be."""
        with self._lock:
            hosts = [standby.host for standby in self._standbys]
        wait(hosts, TAKE_S, FIRST_COMPLETED)
        with self._lock:
            for standby in self._standbys:
                if standby.is_warm and standby.host.result() == host:
                    self._standbys.remove(standby)
                    return standby
        return None

    def _run(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            now = self._clock.now()
            self._drop_lost(now)
            if self._busy():
                self._due = max(self._due, now + QUIET_S)
            with self._lock:
                missing = self._config.standby_ranks - len(self._standbys)
            if missing and now >= self._due:
                self._start(now)

    def _drop_lost(self, now: float) -> None:
        with self._lock:
            lost = {one: why for one in self._standbys if (why := one.beat(now, self._limits))}
            self._standbys = [one for one in self._standbys if one not in lost]
        for standby, why in lost.items():
            standby.handle.kill()
            self._lose(now, why)

    def _start(self, now: float) -> None:
        try:
            handle = self._launcher.launch(NO_RANK)
            standby = _Standby(handle, handle.call(Warm()), now)
        except (RuntimeError, OSError) as error:
            self._lose(now, str(error))
            return
        with self._lock:
            if not self._over.is_set():
                self._standbys.append(standby)
                return
        handle.kill()

    def _lose(self, now: float, why: str) -> None:
        forgotten = now - self._lost_at > 2 * MAX_LOST_PAUSE_S
        self._pause_s = LOST_PAUSE_S if forgotten else min(2 * self._pause_s, MAX_LOST_PAUSE_S)
        self._due, self._lost_at = now + self._pause_s, now
        _log.warning("a standby was lost; another is started in %g s: %s", self._pause_s, why)
