"""WorkerGroup: the ranks of an engine, from their start to their end."""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import replace

from collectives.awake_clock import Deadline
from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership, Transition
from dp_runtime.core.request import (
    FailureListener,
    RankRequest,
    RequestUpdate,
    TransitionListener,
    UpdateListener,
)
from dp_runtime.errors import EngineClosed, RankFailed
from dp_runtime.flight.record import FlightDump
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace
from workers.messages import Abandon, Abort, Submit
from workers.ranks import Launcher, RankHandle, Ranks
from workers.standby.reserve import StandbyReserve
from workers.supervision.at_exit import close_at_exit
from workers.supervision.epochs import Epochs
from workers.supervision.group_flight import GroupFlight, TakenFlight
from workers.supervision.group_state import Evidence, GroupState, Phase
from workers.supervision.interrupts import uninterrupted
from workers.supervision.leaving import STOP_S, leave_together
from workers.supervision.metrics_calls import MetricsCalls
from workers.supervision.poller import Pollers
from workers.supervision.reach import health_of_all, in_child, totals_of_all, trace_of_all
from workers.supervision.recovery import Recovery
from workers.supervision.start_progress import show_capture, show_loading
from workers.supervision.watch import RankWatch, SilenceLimits, name_silent

END_S = 20.0  # for another thread to end what it is closing


class WorkerGroup:
    """Starts ranks, passes requests and outputs, watches ranks and has lost ones replaced.

    It belongs to the process that made it: in a forked child it answers nothing and ends nobody.
    """

    model: ModelInfo

    def __init__(
        self, config: EngineConfig, launcher: Launcher, handles: Sequence[RankHandle]
    ) -> None:
        self._config = config
        self.standbys = StandbyReserve(config, launcher, lambda: self._state.recovering)
        self._ranks = ranks = Ranks(launcher, handles, self.standbys)
        self._recovering: threading.Thread | None = None
        self.metrics = MetricsCalls(lambda: ranks.seats)
        self._lock = threading.RLock()  # an abort may come from the collection of garbage
        self._state = GroupState()
        self._pollers: Pollers | None = None
        self._watch: RankWatch | None = None
        self._flight = GroupFlight(lambda: ranks.seats, config.flight_dump_dir)
        self._epochs = Epochs(config, self._ranks, self._why_not, self._flight.map_rings)
        self._recovery = Recovery(config, self._ranks, self._epochs, self._lose, self._resume)
        self._on_progress: UpdateListener = lambda dp_rank, updates: None
        self._on_failure: FailureListener = lambda error: None
        self._on_transition: TransitionListener = lambda transition, resume: resume({})
        self._failure: BaseException | None = None
        self._given_up = ""  # why the start, or the orderly end, is not waited for any more
        self._over, self._ended = threading.Event(), threading.Event()
        self._owner = os.getpid()
        close_at_exit(self)

    def start(self, show_progress: bool, timeout_s: float) -> None:
        """Bring all ranks to ready; on any failure, or interrupt, none of them is left.

        Raises ValueError if the config or the model is at fault, else StartError.
        """
        try:
            uninterrupted(lambda: self._start(show_progress, timeout_s), self._give_up)
        except BaseException:
            self.close()  # an interrupt may have come once the ranks were ready
            raise

    def _start(self, show_progress: bool, timeout_s: float) -> None:
        try:
            limits, seats = SilenceLimits.while_starting(self._config), self._ranks.seats
            watch = RankWatch(seats, limits, lambda ranks, text: self._give_up(text))
            self._watch, deadline = watch, Deadline(timeout_s)
            self._check_owner()
            self._epochs.prepare(seats, deadline)
            with ProgressBar("load", 0, "byte", show_progress) as bar:
                show = lambda: show_loading(bar, watch.healths)  # noqa: E731
                self.model = self._epochs.load(seats, deadline, show)[0]
            with ProgressBar("capture", 0, "graph", show_progress) as bar:
                attach_s = self._config.start_timeout_s
                self._epochs.begin(deadline, attach_s, lambda: show_capture(bar, watch.healths))
            watch.serve(SilenceLimits.while_serving(self._config), self._notice)
            self._advance(Phase.SERVING)
            self.standbys.begin()
        except BaseException:
            self._end()
            raise

    @property
    def belongs_here(self) -> bool:
        return os.getpid() == self._owner

    def _give_up(self, reason: str = "it was interrupted") -> None:
        self._given_up = self._given_up or reason

    def _why_not(self) -> str:
        if self._state.phase is Phase.CLOSED:
            return "the engine is closed"
        return self._given_up if self._state.phase is Phase.STARTING else ""

    @property
    def members(self) -> Membership:
        return self._ranks.members

    def listen(
        self,
        on_progress: UpdateListener,
        on_failure: FailureListener,
        on_transition: TransitionListener,
    ) -> None:
        with self._lock:
            self._on_progress, self._on_failure = on_progress, on_failure
            self._on_transition = on_transition
            failure = self._failure
        if failure is not None:  # a rank was lost before anybody listened
            on_failure(failure)
        self._pollers = Pollers(on_progress, self._suspect, lambda: self._state.epoch, self._over)
        self._pollers.follow(self._ranks.seats)

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        """Give requests to a rank; one whose rank is lost waits for the engine's next answer."""
        self._check_owner()
        with self._lock:
            if dp_rank not in self._state.lost:
                self._send(dp_rank, requests)

    def _send(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        submitted = self._ranks.seat(dp_rank).call(Submit(requests))
        submitted.add_done_callback(lambda done: self._refused(dp_rank, requests, done))

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self._check_owner()
        with self._lock:
            if dp_rank not in self._state.lost:
                self._ranks.seat(dp_rank).call(Abort(request_ids))

    def health(self) -> tuple[RankHealth, ...]:
        if not self.belongs_here:
            return tuple(in_child(seat.dp_rank, self._owner) for seat in self._ranks.seats)
        return health_of_all(self._ranks)

    def trace(self) -> tuple[StepTrace, ...]:
        self._check_owner()
        return trace_of_all(self._ranks)

    def totals(self) -> tuple[Totals, ...]:
        self._check_owner()
        return totals_of_all(self._ranks)

    def flight_record(self) -> FlightDump:
        self._check_owner()
        return self._take_flight("on demand").read()

    def close(self) -> None:
        """End all ranks; returns once they have ended, whoever began it."""
        if self.belongs_here:
            uninterrupted(self.close_now, self._give_up)

    def close_now(self) -> None:
        """Close in this thread, which an interrupt may end halfway."""
        before = self._state
        if not self._advance(Phase.CLOSED):
            self._ended.wait(STOP_S + END_S)
            return
        try:
            if before.phase < Phase.FAILED and not before.recovering:
                # else there is no step that they could end together
                leave_together(self._ranks, self._watch, lambda: bool(self._given_up))
        finally:
            self._end()

    def _notice(self, dp_ranks: Sequence[int], text: str) -> None:
        for dp_rank in dp_ranks or (None,):
            self._suspect(Evidence(text, dp_rank), self._state.epoch)

    def _suspect(self, evidence: Evidence, epoch: int) -> None:
        """Take in evidence of a fault; the first of an epoch starts the recovery."""
        with self._lock:
            state = self._state
            if state.phase is not Phase.SERVING or epoch != state.epoch:
                return
            self._recovery.note(evidence)
            if state.recovering:
                return
            self._state = replace(state, recovering=True)
            name = f"recover-epoch-{epoch}"
            self._recovering = threading.Thread(
                target=self._recover, args=(evidence,), name=name, daemon=True
            )
            self._recovering.start()

    def _recover(self, evidence: Evidence) -> None:
        text = self._told(evidence)
        self._flight.write_later(self._take_flight(text))
        try:
            self._recovery.run(text)
        except EngineClosed:
            pass
        except Exception as error:
            self._fail(error if isinstance(error, RankFailed) else RankFailed(str(error)))

    def _lose(self, dp_ranks: Collection[int]) -> None:
        """What is submitted to these ranks from now on waits, as all their requests do."""
        with self._lock:
            self._state = replace(self._state, lost=self._state.lost | frozenset(dp_ranks))
        if self._watch is not None:
            self._watch.renew(dp_ranks)

    def _resume(self) -> None:
        """Begin the epoch in which all ranks step again with the requests of lost ones."""
        with self._lock:
            lost, tell = self._state.lost, self._on_transition
        if self._watch is not None:
            self._watch.serve(SilenceLimits.while_serving(self._config), self._notice)

        def resume(requests: dict[int, list[RankRequest]]) -> None:
            with self._lock:
                for dp_rank, some in requests.items():
                    self._send(dp_rank, some)
                self._state = replace(
                    self._state, epoch=self._epochs.number, recovering=False, lost=frozenset()
                )

        tell(Transition(self._ranks.members, lost), resume)

    def _fail(self, error: BaseException) -> None:
        if self._advance(Phase.FAILED):
            with self._lock:
                self._failure, tell = error, self._on_failure
            tell(error)
            for seat in self._ranks.seats:
                seat.call(Abandon(str(error)))

    def _take_flight(self, reason: str) -> TakenFlight:
        return self._flight.take(reason, self._watch.silences_s if self._watch else {})

    def _told(self, evidence: Evidence) -> str:
        """Name who does not answer before what another rank, which may be well, has noticed."""
        if evidence.dp_rank is not None or self._watch is None:
            return evidence.text
        silent = self._watch.ask()
        return f"{name_silent(silent)}; {evidence.text}" if silent else evidence.text

    def _advance(self, phase: Phase) -> bool:
        """Enter a later phase; False if the group is in that phase, or a later one, already."""
        with self._lock:
            later = phase > self._state.phase
            if later:
                self._state = replace(self._state, phase=phase)
            return later

    def _check_owner(self) -> None:
        if not self.belongs_here:
            raise RankFailed(in_child(0, self._owner).error)

    def _end(self) -> None:
        self._advance(Phase.CLOSED)
        self._over.set()
        if self._watch is not None:
            self._watch.end()
        self._flight.finish()
        self._ranks.kill()
        if self._pollers is not None:  # else the last user of the engine may be a daemon at exit
            self._pollers.join()
        recovering = self._recovering
        if recovering is not None and recovering is not threading.current_thread():
            recovering.join(END_S)
        self._epochs.forget_meeting()
        self._ranks.launcher.release()
        self._ended.set()

    def _refused(
        self, dp_rank: int, requests: Sequence[RankRequest], submitted: Future[None]
    ) -> None:
        """Tell the callers of requests that a rank could not take; a lost rank is told of once."""
        error = submitted.exception()
        if error is not None and not isinstance(error, RankFailed):
            text = f"{type(error).__name__}: {error}"
            told = [RequestUpdate(one.request_id, len(one.outputs), error=text) for one in requests]
            self._on_progress(dp_rank, told)
