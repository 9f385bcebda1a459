"""WorkerGroup: the ranks of an engine, through one small handle per rank."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import replace
from typing import TypeVar

from collectives.awake_clock import LOOK_EVERY_S, Deadline
from collectives.shared_memory.rendezvous import remove_rendezvous
from dp_runtime.config import EngineConfig
from dp_runtime.core.request import FailureListener, RankRequest, RequestUpdate, UpdateListener
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.flight.record import FlightDump
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace
from workers.communicators import transport_of, where
from workers.messages import (
    Abandon,
    Abort,
    AnyRendezvous,
    HostInfo,
    Join,
    Load,
    Message,
    OpenRendezvous,
    Poll,
    Prepare,
    ReadHealth,
    ReadTotals,
    ReadTrace,
    Rendezvous,
    Stop,
    Submit,
)
from workers.supervision.at_exit import close_at_exit
from workers.supervision.group_flight import GroupFlight, TakenFlight
from workers.supervision.group_state import GroupState, Phase
from workers.supervision.interrupts import uninterrupted
from workers.supervision.metrics_calls import MetricsCalls
from workers.supervision.rank_calls import RankHandle, call_all
from workers.supervision.reach import health_of, in_child
from workers.supervision.start_progress import show_capture, show_loading
from workers.supervision.watch import RankWatch, SilenceLimits, name_silent

_log = logging.getLogger(__name__)

POLL_S = 1.0
STATUS_S = 5.0
STOP_S = 12.0
LEAVE_SILENCE_S = 2.0  # a rank that leaves answers meanwhile
END_S = 20.0  # for another thread to end what it is closing

Answer = TypeVar("Answer")


class WorkerGroup:
    """Starts ranks through handles, passes requests and outputs, watches them, ends them.

    It belongs to the process that made it: in a forked child it answers nothing and ends nobody.
    """

    model: ModelInfo

    def __init__(
        self,
        config: EngineConfig,
        handles: Sequence[RankHandle],
        release: Callable[[], None],
        rendezvous: AnyRendezvous | None = None,
    ) -> None:
        """Take over the handles; `rendezvous` is for ranks that can not open one themselves."""
        self._config = config
        self._handles = handles
        self.metrics = MetricsCalls(handles)
        self._release = release
        self._lock = threading.Lock()
        self._state = GroupState(rendezvous=rendezvous)
        self._pollers: list[threading.Thread] = []
        self._watch: RankWatch | None = None
        self._flight = GroupFlight(handles, config.flight_dump_dir)
        self._on_progress: UpdateListener = lambda dp_rank, updates: None
        self._on_failure: FailureListener = lambda error: None
        self._failure: BaseException | None = None
        self._given_up = ""  # why the start, or the orderly end, is not waited for any more
        self._ended = threading.Event()
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
            limits = SilenceLimits.while_starting(self._config)
            watch = self._watch = RankWatch(self._handles, limits, self._give_up)
            deadline = Deadline(timeout_s)
            hosts = self._all(Prepare(), deadline)
            self._flight.map_rings(hosts)
            with ProgressBar("load", 0, "byte", show_progress) as bar:
                infos = self._all(Load(), deadline, lambda: show_loading(bar, watch.healths))
                self.model = infos[0]
            rendezvous = self._meet(hosts, deadline)
            with ProgressBar("capture", 0, "graph", show_progress) as bar:
                join = Join(rendezvous, self._state.epoch)
                self._all(join, deadline, lambda: show_capture(bar, watch.healths))
            watch.serve(SilenceLimits.while_serving(self._config), self._lose)
            self._advance(Phase.SERVING)
        except BaseException:
            self._end()
            raise

    @property
    def belongs_here(self) -> bool:
        return os.getpid() == self._owner

    def _give_up(self, reason: str = "it was interrupted") -> None:
        self._given_up = self._given_up or reason

    def _lose(self, silence: str) -> None:
        self._fail(RankFailed(silence))

    def _fail(self, error: BaseException) -> None:
        if self._advance(Phase.FAILED):
            taken = self._take_flight(str(error))
            with self._lock:
                self._failure, tell = error, self._on_failure
            self._flight.write_later(taken)
            tell(error)
            for handle in self._handles:
                handle.call(Abandon(str(error)))

    def _take_flight(self, reason: str) -> TakenFlight:
        return self._flight.take(reason, self._watch.silences_s if self._watch else ())

    def listen(self, on_progress: UpdateListener, on_failure: FailureListener) -> None:
        with self._lock:
            self._on_progress, self._on_failure = on_progress, on_failure
            failure = self._failure
        if failure is not None:  # a rank was lost before anybody listened
            on_failure(failure)
        for handle in self._handles:
            thread = threading.Thread(target=self._poll, args=(handle,), daemon=True)
            thread.start()
            self._pollers.append(thread)

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        self._check_owner()
        submitted = self._handles[dp_rank].call(Submit(requests))
        submitted.add_done_callback(lambda done: self._refused(dp_rank, requests, done))

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self._check_owner()
        self._handles[dp_rank].call(Abort(request_ids))

    def health(self) -> tuple[RankHealth, ...]:
        if not self.belongs_here:
            return tuple(in_child(handle.dp_rank, self._owner) for handle in self._handles)
        futures = [handle.call(ReadHealth()) for handle in self._handles]
        wait(futures, STATUS_S)
        return tuple(health_of(rank, future) for rank, future in enumerate(futures))

    def trace(self) -> tuple[StepTrace, ...]:
        ranks = self._all(ReadTrace(), Deadline(STATUS_S))
        steps = [step for rank in ranks for step in rank]
        return tuple(sorted(steps, key=lambda step: (step.step_id, step.dp_rank)))

    def totals(self) -> tuple[Totals, ...]:
        return tuple(self._all(ReadTotals(), Deadline(STATUS_S)))

    def flight_record(self) -> FlightDump:
        self._check_owner()
        return self._take_flight("on demand").read()

    def close(self) -> None:
        """End all ranks; returns once they have ended, whoever began it."""
        if self.belongs_here:
            uninterrupted(self.close_now, self._give_up)

    def close_now(self) -> None:
        """Close in this thread, which an interrupt may end halfway."""
        before = self._state.phase
        if not self._advance(Phase.CLOSED):
            self._ended.wait(STOP_S + END_S)
            return
        try:
            if before < Phase.FAILED:  # else there is no step that they could end together
                self._leave_together()
        finally:
            self._end()

    def _leave_together(self) -> None:
        """Let all ranks stop, unless one has ended or does not answer any more."""
        leaving = [handle.call(Stop()) for handle in self._handles]
        deadline = Deadline(STOP_S)
        while deadline.left() > 0 and not self._given_up:
            done, left = wait(leaving, LOOK_EVERY_S, FIRST_EXCEPTION)
            lost = self._watch.silent(LEAVE_SILENCE_S) if self._watch else []
            if not left or lost or any(future.exception() for future in done):
                return

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

    def _meet(self, hosts: Sequence[HostInfo], deadline: Deadline) -> AnyRendezvous:
        if self._state.rendezvous is None:
            one_host = len({host.host for host in hosts}) == 1
            opening = OpenRendezvous(transport_of(self._config, hosts).name, one_host)
            rendezvous = self._all(opening, deadline, num_ranks=1)[0]
            _log.info("ranks on %s meet over %s at %s", *where(hosts, rendezvous))
            self._state = replace(self._state, rendezvous=rendezvous)
        assert self._state.rendezvous is not None, "it was given, or opened just now"
        return self._state.rendezvous

    def _end(self) -> None:
        self._advance(Phase.CLOSED)
        if self._watch is not None:
            self._watch.end()
        self._flight.finish()
        for handle in self._handles:
            handle.kill()
        for poller in self._pollers:  # else the last user of the engine may be a daemon at exit
            if poller is not threading.current_thread():
                poller.join(POLL_S)
        met = self._state.rendezvous
        if isinstance(met, Rendezvous) and met.in_host_memory:
            remove_rendezvous(met.address)  # a rank that was killed as it attached could not
        self._release()
        self._ended.set()

    def _poll(self, handle: RankHandle) -> None:
        while self._state.phase is not Phase.CLOSED:
            try:
                polled = handle.call(Poll(POLL_S)).result()
                if polled.progress:
                    self._on_progress(handle.dp_rank, polled.progress)
                if polled.error:
                    self._fail(RankFailed(self._with_silent(polled.error)))
                    return
            except RankFailed as error:
                self._fail(error)
                return
            except Exception as error:
                self._fail(RankFailed(f"rank {handle.dp_rank}: {type(error).__name__}: {error}"))
                return

    def _with_silent(self, error: str) -> str:
        """Name who does not answer before what another rank, which may be well, has noticed."""
        silent = self._watch.ask() if self._watch else []
        return f"{name_silent(silent)}; {error}" if silent else error

    def _refused(
        self, dp_rank: int, requests: Sequence[RankRequest], submitted: Future[None]
    ) -> None:
        """Tell the callers of requests that a rank could not take; a lost rank is told of once."""
        error = submitted.exception()
        if error is not None and not isinstance(error, RankFailed):
            text = f"{type(error).__name__}: {error}"
            updates = [RequestUpdate(one.request_id, 0, error=text) for one in requests]
            self._on_progress(dp_rank, updates)

    def _all(
        self,
        message: Message[Answer],
        deadline: Deadline,
        show: Callable[[], None] = lambda: None,
        num_ranks: int | None = None,
    ) -> list[Answer]:
        """Call all ranks, or the first ones, and stop waiting once the start is given up."""
        self._check_owner()

        def meanwhile() -> None:
            if self._given_up and self._state.phase is Phase.STARTING:
                raise StartError(f"{self._given_up} (during {message.name!r})")
            show()

        return call_all(self._handles[:num_ranks], message, deadline, meanwhile)
