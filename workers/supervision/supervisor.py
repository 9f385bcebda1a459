"""Supervisor: keeps ranks in service, through faults and through changes of who they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace
from time import monotonic
from typing import TypeVar

from collectives.awake_clock import LOOK_EVERY_S, Deadline
from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership, Transition
from dp_runtime.core.rank_events.listeners import Listeners, Resume
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.errors import EngineClosed, RankFailed, ResizeFailed, StartError, fresh
from workers.messages import Abandon, Message, Submit
from workers.ranks import Ranks, Seat
from workers.supervision.changes import Changes
from workers.supervision.epochs import Epochs
from workers.supervision.group_flight import GroupFlight, TakenFlight
from workers.supervision.group_state import Evidence, GroupState, Phase
from workers.supervision.poller import Pollers
from workers.supervision.recovery import Recovery
from workers.supervision.watch import RankWatch, SilenceLimits, name_silent, watched

THREADS_END_S = 20.0  # for another thread to end what it is closing
Answer = TypeVar("Answer")


def _go_on_without_requests(transition: Transition, resume: Resume) -> int:
    resume({})
    return 0


NOBODY = Listeners(
    on_progress=lambda dp_rank, updates: None,
    on_failure=lambda error: None,
    on_transition=_go_on_without_requests,
    on_load=lambda dp_rank, load: None,
    on_kv_events=lambda dp_rank, events: None,
)


class Supervisor:
    """Watches ranks, begins epochs, and tells its listeners who serves in them."""

    def __init__(
        self,
        config: EngineConfig,
        ranks: Ranks,
        epochs: Epochs,
        flight: GroupFlight,
        over: threading.Event,
    ) -> None:
        self._config, self._ranks, self._epochs, self._flight = config, ranks, epochs, flight
        self.lock = threading.RLock()  # an abort may come from the collection of garbage
        self.state = GroupState()
        self.watch: RankWatch | None = None
        self.failure: BaseException | None = None
        self._over = over
        self._changed = threading.Condition(self.lock)  # the state
        self.changes = Changes(self._change, lambda: ranks.members, over)
        self._threads: set[threading.Thread] = set()  # that begin an epoch
        self._recovery = Recovery(config, ranks, epochs, self)
        self._pollers: Pollers | None = None
        self._listeners = NOBODY

    def listen(self, listeners: Listeners) -> None:
        with self.lock:
            self._listeners, failure = listeners, self.failure
        if failure is not None:  # a rank was lost before anybody listened
            listeners.on_failure(failure)
        self._pollers = Pollers(listeners, self._suspect, lambda: self.state.epoch, self._over)
        self._pollers.follow(self._ranks.seats)

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        with self.lock:
            if dp_rank not in self.state.gone:
                self._send(dp_rank, requests)

    def tell(self, dp_rank: int, message: Message[None]) -> None:
        """Tell a rank something of its requests, unless it is lost and they go on elsewhere."""
        with self.lock:
            if dp_rank in self._ranks.members and dp_rank not in self.state.gone:
                self._ranks.seat(dp_rank).call(message)

    def until_answered(self, ask: Callable[[], Answer]) -> Answer:
        """Ask ranks again while one of them is lost or replaced; RankFailed if it stays so."""
        until = monotonic() + self._config.start_timeout_s
        while True:
            try:
                return ask()
            except (RankFailed, StartError) as error:
                self._raise_if_over()
                if monotonic() >= until:
                    raise RankFailed(str(error)) from error
            with self._changed:
                self._changed.wait(LOOK_EVERY_S)

    def advance(self, phase: Phase) -> bool:
        """Enter a later phase; False if the group is in that phase, or a later one, already."""
        with self.lock:
            later = phase > self.state.phase
            if later:
                self._set(replace(self.state, phase=phase))
            return later

    def serve(self, watch: RankWatch) -> None:
        watch.serve(SilenceLimits.while_serving(self._config), self._notice)
        self.advance(Phase.SERVING)

    def change(self, target: Membership, why_not: Callable[[], str]) -> None:
        """Have these serve, beginning with an epoch of their own.

        Raises ValueError if they do not fit, ResizeFailed if others can not be started, until
        when the ranks go on as they are; EngineClosed or RankFailed if the engine ends meanwhile.
        """
        self.changes.make(target, why_not)

    def _change(self, target: Membership, why_not: Callable[[], str]) -> None:
        self._raise_if_over()
        if target == self._ranks.members:
            return
        joining = self._bring_up(target, why_not)
        try:
            self._claim()
        except BaseException:
            self._ranks.dismiss(joining)
            raise
        self._begin(lambda: self._recovery.change(target, joining))
        self._raise_if_over()
        if any(seat.dp_rank not in self._ranks.members for seat in joining):
            raise ResizeFailed(f"{self._recovery.trouble}; ranks {self._ranks.members} serve on")

    def _bring_up(self, target: Membership, why_not: Callable[[], str]) -> list[Seat]:
        deadline, new = Deadline(self._config.start_timeout_s), target.besides(self._ranks.members)
        seats: list[Seat] = []
        try:
            self.until_answered(lambda: self._epochs.check(target, deadline))
            if new:
                seats = self._ranks.launch(sorted(new), self._config.start_timeout_s)
                with watched(seats, self._config) as silent:
                    doomed = lambda: why_not() or silent()  # noqa: E731
                    self._epochs.prepare(seats, deadline, doomed, target)
                    both = [*self._ranks.seats, *seats]
                    self._epochs.check_hosts([one for one in both if one.dp_rank in target])
                    self._epochs.load(seats, deadline, doomed=doomed)
        except BaseException as error:
            self._ranks.dismiss(seats)
            if isinstance(error, OSError | RuntimeError):
                self._raise_if_over()
                raise ResizeFailed(f"{error}; ranks {self._ranks.members} serve on") from error
            raise
        return seats

    def _claim(self) -> None:
        """Wait for the end of a recovery, and be the one who begins the next epoch."""
        deadline = Deadline(self._config.start_timeout_s)
        with self._changed:
            while self.state.recovering and self.state.phase is Phase.SERVING:
                if deadline.left() <= 0:
                    raise ResizeFailed("a recovery is under way, and does not end")
                self._changed.wait(LOOK_EVERY_S)
            self._raise_if_over()
            self._set(replace(self.state, recovering=True))

    def _raise_if_over(self) -> None:
        if self.failure is not None:
            raise fresh(self.failure)
        if self.state.phase is not Phase.SERVING:
            raise EngineClosed("the engine is closed")

    def _notice(self, dp_ranks: Sequence[int], text: str) -> None:
        for dp_rank in dp_ranks or (None,):
            self._suspect(Evidence(text, dp_rank), self.state.epoch)

    def _suspect(self, evidence: Evidence, epoch: int) -> None:
        """Take in evidence of a fault; the first of an epoch starts the recovery."""
        with self.lock:
            state = self.state
            if state.phase is not Phase.SERVING or epoch != state.epoch:
                return
            self._recovery.note(evidence)
            if state.recovering:
                return
            self._set(replace(state, recovering=True))
            threading.Thread(
                target=self._recover, args=(evidence,), name=f"recover-epoch-{epoch}", daemon=True
            ).start()

    def _recover(self, evidence: Evidence) -> None:
        def recover() -> None:
            text = self._told(evidence)
            self._flight.write_later(self.take_flight(text))
            self._recovery.run(text)
            self.changes.restore_later()

        self._begin(recover)

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.current_thread()
        self._threads.add(thread)
        try:
            work()
        except EngineClosed:
            pass
        except Exception as error:
            self._fail(error if isinstance(error, RankFailed) else RankFailed(str(error)))
        finally:
            self._threads.discard(thread)

    def gone(self, lost: Collection[int], left: Collection[int]) -> None:
        """What is submitted to these ranks from now on waits, as all their requests do."""
        with self.lock:
            state = self.state
            self._set(
                replace(state, lost=state.lost | frozenset(lost), left=state.left | frozenset(left))
            )
        if self.watch is not None:
            self.watch.renew(lost)

    def enter(self, members: Membership, joining: Sequence[Seat]) -> list[Seat]:
        vacated = self._ranks.enter(members, joining)
        if self.watch is not None:
            self.watch.follow(self._ranks.seats)
        if self._pollers is not None:
            self._pollers.follow(self._ranks.seats)
        return vacated

    def begun(self) -> int:
        """Begin the epoch in which all ranks step again with the requests of those gone."""
        with self.lock:
            state, tell = self.state, self._listeners.on_transition

        def resume(requests: dict[int, list[RankRequest]]) -> None:
            with self.lock:
                for dp_rank, some in requests.items():
                    self._send(dp_rank, some)
                none, epoch = frozenset[int](), self._epochs.number
                after = replace(self.state, epoch=epoch, recovering=False, lost=none, left=none)
                self._set(after)
                if self.watch is not None:  # now: what it told before was of the last epoch
                    self.watch.serve(SilenceLimits.while_serving(self._config), self._notice)

        return tell(Transition(self._ranks.members, state.lost, state.left), resume) or 0

    def _send(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        submitted = self._ranks.seat(dp_rank).call(Submit(requests))
        submitted.add_done_callback(lambda done: self._refused(dp_rank, requests, done))

    def _refused(
        self, dp_rank: int, requests: Sequence[RankRequest], submitted: Future[None]
    ) -> None:
        """Tell the callers of requests that a rank could not take; a lost rank is told of once."""
        error = submitted.exception()
        if error is not None and not isinstance(error, RankFailed):
            text = f"{type(error).__name__}: {error}"
            told = [RequestUpdate(one.request_id, len(one.outputs), error=text) for one in requests]
            self._listeners.on_progress(dp_rank, told)

    def _set(self, state: GroupState) -> None:
        with self._changed:
            self.state = state
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        if self.advance(Phase.FAILED):
            with self.lock:
                self.failure, tell = error, self._listeners.on_failure
            tell(error)
            for seat in self._ranks.seats:
                seat.call(Abandon(str(error)))

    def take_flight(self, reason: str) -> TakenFlight:
        return self._flight.take(reason, self.watch.silences_s if self.watch else {})

    def _told(self, evidence: Evidence) -> str:
        """Name who does not answer before what another rank, which may be well, has noticed."""
        if evidence.dp_rank is not None or self.watch is None:
            return evidence.text
        silent = self.watch.ask()
        return f"{name_silent(silent)}; {evidence.text}" if silent else evidence.text

    def end(self) -> None:
        if self._pollers is not None:  # else the last user of the engine may be a daemon at exit
            self._pollers.join()
        for thread in self._threads - {threading.current_thread()}:
            thread.join(THREADS_END_S)
