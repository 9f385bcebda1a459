"""Recovery: from evidence of a fault to a new epoch with all ranks."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from collectives.awake_clock import Deadline
from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.errors import EngineClosed, PolicyFailed, RankFailed, StartError
from dp_runtime.metrics.status import RankHealth
from workers.messages import Abandon, ReadHealth, Suspend
from workers.ranks import Ranks, Seat
from workers.supervision.epochs import Epochs
from workers.supervision.group_state import Evidence
from workers.supervision.watch import LOADS

_log = logging.getLogger(__name__)

WINDOW_S = 60.0  # in which max_recoveries are counted
SUSPEND_S = 6.0  # for a rank to leave its step
ASK_S = 1.0  # for one that is late to say that it loads
MEET_S = 30.0  # for ranks that have loaded to meet
VAIN_TRIES = 2  # to replace ranks, until the others go on without them if they may
COME_UP_S = 60.0  # for a process to come up, where the others may go on without it
RETRY_PAUSE_S = 0.2  # before the second attempt, doubled for each that follows
MAX_RETRY_PAUSE_S = 10.0


@dataclass(frozen=True)
class Recovered:
    """One line of the history."""

    at: float
    dp_ranks: tuple[int, ...]
    text: str
    seconds: float

    def __str__(self) -> str:
        who = f"ranks {list(self.dp_ranks)}" if self.dp_ranks else "no rank"
        return f"{who} ({self.text}), in {self.seconds:.1f} s"


class Seating(Protocol):
    """Who hears of ranks that come and go."""

    def gone(self, lost: Collection[int], left: Collection[int]) -> None:
        """Some serve no more, before others take their seats, or they are without a seat."""

    def enter(self, members: Membership, joining: Sequence[Seat]) -> list[Seat]:
        """Have these serve; return the seats of those who do no more."""

    def begun(self) -> int: ...  # all ranks step again; losses that were put down to a request


class Recovery:
    """Replaces lost ranks; the others keep weights, pages and requests."""

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        epochs: Epochs,
        seating: Seating,
    ) -> None:
        self._config, self._ranks, self._epochs = config, ranks, epochs
        self._seating = seating
        self._lock = threading.Lock()
        self._evidence: list[Evidence] = []
        self._history: deque[Recovered] = deque()
        self.trouble = ""  # of the last vain attempt

    def note(self, evidence: Evidence) -> None:
        with self._lock:
            self._evidence.append(evidence)

    def run(self, first: str) -> None:
        """Begin the next epoch; RankFailed, with the history, if that does not succeed.

        first: the text of the evidence that this began with.
        """
        started = monotonic()
        if any(one.dp_rank is not None for one in self._evidence):
            self._check_history(started, first, 0)  # nobody needs to be asked for that
        missing, ends_requests = self._suspend_all(first)
        counts = bool(missing) or not ends_requests
        if counts:
            self._check_history(started, first, 0)
        lost, tried = self._replace(first, missing)
        num_blamed = self._seating.begun()
        done = Recovered(started, tuple(sorted(lost)), first, monotonic() - started)
        if counts or tried:
            self._history.append(done)
        self._forgive(num_blamed)
        _log.warning("recovered: epoch %d after the loss of %s", self._epochs.number, done)

    def change(self, target: Membership, joining: Sequence[Seat]) -> None:
        """Begin the next epoch with others, who have loaded; ranks lost meanwhile are replaced.

        If they do not come together, those that served go on without the new ones.
        """
        started, first = monotonic(), f"the ranks are to be {target}"
        missing, _ = self._suspend_all(first)
        known = {*self._ranks.members.dp_ranks, *(seat.dp_rank for seat in joining)}
        members = Membership(tuple(rank for rank in target.dp_ranks if rank in known))
        left = self._ranks.members.besides(members)
        if missing - left:
            self._check_history(started, f"ranks {sorted(missing - left)} were lost as {first}", 0)
        self._seating.gone(missing - left, left)
        leaving = self._seating.enter(members, joining)
        newcomers = frozenset(seat.dp_rank for seat in joining)
        replaced, _ = self._replace(first, missing - left, newcomers)
        num_blamed = self._seating.begun()
        self._ranks.dismiss(leaving)
        members, seconds = self._ranks.members, monotonic() - started
        if lost := replaced - newcomers:
            self._history.append(Recovered(started, tuple(sorted(lost)), first, seconds))
        self._forgive(num_blamed)
        _log.warning(
            "changed: epoch %d has ranks %s, after %.1f s", self._epochs.number, members, seconds
        )

    def _forgive(self, num_losses: int) -> None:
        """Forget the last losses, as no input ends an engine."""
        for _ in range(min(num_losses, len(self._history))):
            self._history.pop()

    def _replace(
        self, first: str, missing: set[int], newcomers: frozenset[int] = frozenset()
    ) -> tuple[set[int], int]:
        """Begin the next epoch with others on missing seats: all who were lost, vain attempts."""
        lost, tried, pause_s = set(missing), 0, RETRY_PAUSE_S
        while True:
            self._seating.gone(missing, frozenset())
            try:
                self._begin_epoch([self._ranks.seat(dp_rank) for dp_rank in sorted(missing)])
                break
            except EngineClosed:
                raise
            except (StartError, RankFailed, ValueError, OSError) as error:
                self.trouble = str(error)
                _log.warning("recovery: %s", error)
                threading.Event().wait(pause_s)
                tried, pause_s = tried + 1, min(2 * pause_s, MAX_RETRY_PAUSE_S)
            missing, _ = self._suspend_all("a rank could not be replaced")
            lost |= missing
            vain = self._dispensable(missing, newcomers) if tried >= self._patience else set()
            if vain:
                self._seating.gone(vain, frozenset())
                members = self._ranks.members.without(vain)
                self._ranks.dismiss(self._seating.enter(members, ()))
                _log.warning("degraded: ranks %s go on without %s", members, sorted(vain))
                missing = missing - vain
            if missing or not vain:
                self._check_history(monotonic(), first, tried)
        self._forget_evidence()  # of who was replaced; a poller tells of others again
        return lost, tried

    @property
    def _patience(self) -> int:  # vain attempts, before others go on without somebody
        return min(VAIN_TRIES, self._config.max_recoveries)

    def _dispensable(self, missing: set[int], newcomers: frozenset[int]) -> set[int]:
        """Return without whom the others can go on: those that never served come first."""
        waiting = newcomers & {*self._ranks.members.dp_ranks}
        if waiting:
            return set(waiting)
        return missing if self._can_go_on_without(missing) else set()

    def _can_go_on_without(self, missing: set[int]) -> bool:
        """Tell whether there are enough others, and the experts fit into their memory."""
        fewest = self._config.min_dp_size or self._config.dp_size
        if not missing or self._ranks.members.size - len(missing) < fewest:
            return False
        members = self._ranks.members.without(missing)
        try:
            self._epochs.check(members, Deadline(self._config.start_timeout_s))
        except (StartError, RankFailed, ValueError) as error:
            _log.warning("ranks %s can not go on alone: %s", members, error)
            return False
        return True

    def _forget_evidence(self, dp_ranks: Collection[int] | None = None) -> list[Evidence]:
        """Take the evidence out, all of it or what names one of these ranks."""
        with self._lock:
            taken = [one for one in self._evidence if dp_ranks is None or one.dp_rank in dp_ranks]
            self._evidence = [one for one in self._evidence if one not in taken]
            return taken

    def _doomed(self) -> str:
        """Say who of those that serve was lost since others took the seats of lost ranks."""
        with self._lock:
            serve = (one.text for one in self._evidence if one.dp_rank in self._ranks.members)
            return next(serve, "")

    def _is_spent(self, now: float, tried: int = 0) -> bool:
        while self._history and now - self._history[0].at > WINDOW_S:
            self._history.popleft()
        return len(self._history) + tried >= self._config.max_recoveries

    def _check_history(self, now: float, text: str, tried: int) -> None:
        if not self._is_spent(now, tried):
            return
        before = "; ".join(map(str, self._history))
        since = f"; recovered within {WINDOW_S:g} s before: {before}" if before else ""
        failed = f"; {tried} attempts to replace ranks failed" if tried else ""
        raise RankFailed(text + failed + since)

    def _suspend_all(self, why: str) -> tuple[set[int], bool]:
        """Have all ranks leave the step; those that can not, and if a request that ended was why.

        Such a fault does not count: it takes a request along, so that no input ends an engine.
        Raises PolicyFailed if a policy was why: it would do the same on any other rank.
        """
        evidence = self._forget_evidence()
        reason = evidence[0].text if evidence else why
        lost = {one.dp_rank for one in evidence if one.dp_rank is not None}
        for seat in self._ranks.seats:
            seat.call(Abandon(reason, self._epochs.number))
        others = [seat for seat in self._ranks.seats if seat.dp_rank not in lost]
        asked = {seat.call(Suspend(reason)): seat for seat in others}
        self._await(asked)
        _check_policies(asked)
        noticed = self._forget_evidence()  # meanwhile
        lost |= {one.dp_rank for one in noticed if one.dp_rank is not None}
        failed = [seat for future, seat in asked.items() if not future.done() or future.exception()]
        lost |= {seat.dp_rank for seat in failed}
        ends_requests = any(future.result() for future, seat in asked.items() if seat not in failed)
        return lost & {*self._ranks.members.dp_ranks}, ends_requests

    def _await(self, asked: Mapping[Future[bool], Seat]) -> None:
        """Let these leave their steps; those that load experts finish that before."""
        late, deadline = wait(asked, ASK_S).not_done, Deadline(self._config.start_timeout_s)
        patience = Deadline(SUSPEND_S)
        while late and deadline.left() > 0:
            answers = {future: asked[future].call(ReadHealth()) for future in late}
            silent = wait(answers.values(), ASK_S).not_done
            if any(map(_loads, answers.values())):
                patience = Deadline(SUSPEND_S)
            elif patience.left() <= 0 or (silent and self._is_spent(monotonic())):
                break  # who does not answer leaves no step, and here nobody is to be replaced
            late = wait(late, ASK_S).not_done

    def _begin_epoch(self, seats: list[Seat]) -> None:
        deadline = Deadline(self._config.start_timeout_s)
        if seats:
            self._ranks.replace(seats)
            self._forget_evidence({seat.dp_rank for seat in seats})  # of who sat there before
            self._epochs.prepare(seats, self._deadline_to_come_up(deadline), self._doomed)
            self._epochs.load(seats, deadline, doomed=self._doomed)
        self._epochs.begin(deadline, MEET_S, doomed=self._doomed)

    def _deadline_to_come_up(self, deadline: Deadline) -> Deadline:
        config = self._config
        degrades = (config.min_dp_size or config.dp_size) < self._ranks.members.size
        return Deadline(min(COME_UP_S, config.start_timeout_s)) if degrades else deadline


def _check_policies(asked: Collection[Future[bool]]) -> None:
    for future in asked:
        if future.done() and isinstance(error := future.exception(), PolicyFailed):
            raise error


def _loads(answer: Future[RankHealth]) -> bool:
    if not answer.done() or answer.exception() is not None:
        return False
    return answer.result().state in LOADS
