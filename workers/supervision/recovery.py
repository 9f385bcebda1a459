"""Recovery: from evidence of a fault to a new epoch with all ranks."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import wait
from dataclasses import dataclass
from time import monotonic

from collectives.awake_clock import Deadline
from dp_runtime.config import EngineConfig
from dp_runtime.errors import EngineClosed, RankFailed, StartError
from workers.messages import Abandon, Suspend
from workers.ranks import Ranks, Seat
from workers.supervision.epochs import Epochs
from workers.supervision.group_state import Evidence

_log = logging.getLogger(__name__)

WINDOW_S = 60.0  # in which max_recoveries are counted
SUSPEND_S = 6.0  # for a rank to leave its step
JOIN_S = 30.0  # for ranks that have loaded to meet
PAUSE_S = 0.2  # before the second attempt, doubled for each that follows


@dataclass(frozen=True)
class Recovered:
    """One line of the history."""

    at: float
    dp_ranks: tuple[int, ...]
    text: str
    seconds: float

    def __str__(self) -> str:
        return f"ranks {list(self.dp_ranks)} ({self.text}), in {self.seconds:.1f} s"


class Recovery:
    """Replaces lost ranks; the others keep weights, pages and requests.

    `on_lost` hears who is lost before they are replaced, `on_begun` once all ranks step again.
    """

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        epochs: Epochs,
        on_lost: Callable[[Collection[int]], None],
        on_begun: Callable[[], None],
    ) -> None:
        self._config, self._ranks, self._epochs = config, ranks, epochs
        self._on_lost, self._on_begun = on_lost, on_begun
        self._lock = threading.Lock()
        self._evidence: list[Evidence] = []
        self._history: deque[Recovered] = deque()

    def note(self, evidence: Evidence) -> None:
        with self._lock:
            self._evidence.append(evidence)

    def run(self, first: str) -> None:
        """Begin the next epoch; RankFailed, with the history, if that does not succeed.

        first: the text of the evidence that this began with.
        """
        started, lost, tried = monotonic(), set[int](), 0
        while True:
            if any(one.dp_rank is not None for one in self._evidence):
                self._check_history(started, first, tried)  # nobody needs to be asked for that
            missing, ends_requests = self._suspend_all()
            lost |= missing
            counts = bool(lost) or tried > 0 or not ends_requests
            if counts:
                self._check_history(started, first, tried)
            self._on_lost(missing)
            try:
                self._begin_epoch([self._ranks.seat(dp_rank) for dp_rank in sorted(missing)])
                break
            except EngineClosed:
                raise
            except (StartError, RankFailed, ValueError, OSError) as error:
                _log.warning("recovery: %s", error)
                threading.Event().wait(PAUSE_S * 2**tried)
                tried += 1
        self._forget_evidence()  # of who was replaced; a poller tells of others again
        self._on_begun()
        done = Recovered(started, tuple(sorted(lost)), first, monotonic() - started)
        if counts:
            self._history.append(done)
        _log.warning("recovered: epoch %d after the loss of %s", self._epochs.number, done)

    def _forget_evidence(self, dp_ranks: Collection[int] | None = None) -> list[Evidence]:
        """Take the evidence out, all of it or what names one of these ranks."""
        with self._lock:
            taken = [one for one in self._evidence if dp_ranks is None or one.dp_rank in dp_ranks]
            self._evidence = [one for one in self._evidence if one not in taken]
            return taken

    def _doomed(self) -> str:
        """Say who was lost since others took the seats of lost ranks."""
        with self._lock:
            return next((one.text for one in self._evidence if one.dp_rank is not None), "")

    def _check_history(self, now: float, text: str, tried: int) -> None:
        while self._history and now - self._history[0].at > WINDOW_S:
            self._history.popleft()
        limit = self._config.max_recoveries
        if len(self._history) + tried < limit:
            return
        before = "; ".join(map(str, self._history))
        since = f"; recovered within {WINDOW_S:g} s before: {before}" if before else ""
        failed = f"; {tried} attempts to replace ranks failed" if tried else ""
        raise RankFailed(text + failed + since)

    def _suspend_all(self) -> tuple[set[int], bool]:
        """Have all ranks leave the step; those that can not, and if a request that ended was why.

        Such a fault does not count: it takes a request along, so that no input ends an engine.
        """
        evidence = self._forget_evidence()
        reason = evidence[0].text if evidence else "a rank could not be replaced"
        lost = {one.dp_rank for one in evidence if one.dp_rank is not None}
        for seat in self._ranks.seats:
            seat.call(Abandon(reason, self._epochs.number))
        asked = [
            (seat, seat.call(Suspend(reason)))
            for seat in self._ranks.seats
            if seat.dp_rank not in lost
        ]
        wait([future for _, future in asked], SUSPEND_S)
        noticed = self._forget_evidence()  # meanwhile
        lost |= {one.dp_rank for one in noticed if one.dp_rank is not None}
        failed = [seat for seat, future in asked if not future.done() or future.exception()]
        lost |= {seat.dp_rank for seat in failed}
        return lost, any(future.result() for seat, future in asked if seat not in failed)

    def _begin_epoch(self, seats: list[Seat]) -> None:
        deadline = Deadline(self._config.start_timeout_s)
        if seats:
            self._ranks.replace(seats)
            self._forget_evidence({seat.dp_rank for seat in seats})  # of who sat there before
            self._epochs.prepare(seats, deadline, self._doomed)
            self._epochs.load(seats, deadline, doomed=self._doomed)
        self._epochs.begin(deadline, JOIN_S)
