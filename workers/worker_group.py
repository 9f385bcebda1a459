"""WorkerGroup: the ranks of an engine, from their start to their end."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from collectives.awake_clock import Deadline
from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.core.rank_events.listeners import Listeners
from dp_runtime.core.request import RankRequest
from dp_runtime.errors import RankFailed
from dp_runtime.flight.record import FlightDump
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace
from workers.messages import Abort, Recall
from workers.ranks import Launcher, RankHandle, Ranks
from workers.standby.reserve import StandbyReserve
from workers.supervision.at_exit import close_at_exit
from workers.supervision.epochs import Epochs
from workers.supervision.group_flight import GroupFlight
from workers.supervision.group_state import Phase
from workers.supervision.interrupts import uninterrupted
from workers.supervision.leaving import STOP_S, leave_together
from workers.supervision.metrics_calls import MetricsCalls
from workers.supervision.reach import (
    STATUS_S,
    health_of_all,
    in_child,
    totals_of_all,
    trace_of_all,
)
from workers.supervision.start_progress import show_capture, show_loading
from workers.supervision.supervisor import THREADS_END_S, Supervisor
from workers.supervision.watch import RankWatch, SilenceLimits


class WorkerGroup:
    """Starts ranks, passes requests and outputs, watches ranks and has lost ones replaced.

    It belongs to the process that made it: in a forked child it answers nothing and ends nobody.
    """

    model: ModelInfo

    def __init__(
        self, config: EngineConfig, launcher: Launcher, handles: Sequence[RankHandle]
    ) -> None:
        self._config = config
        self.standbys = StandbyReserve(config, launcher, lambda: self._supervisor.state.recovering)
        self._ranks = ranks = Ranks(launcher, handles, self.standbys)
        self.metrics = MetricsCalls(lambda: ranks.seats)
        self._over, self._ended = threading.Event(), threading.Event()
        self._flight = GroupFlight(lambda: ranks.seats, config.flight_dump_dir)
        self._epochs = Epochs(config, ranks, self._why_not, self._flight.map_rings)
        self._supervisor = Supervisor(config, ranks, self._epochs, self._flight, self._over)
        self._given_up = ""  # why the start, or the orderly end, is not waited for any more
        self._owner = os.getpid()
        close_at_exit(self)

    def start(
        self,
        show_progress: bool,
        timeout_s: float,
        first: Mapping[int, Sequence[RankRequest]] = MappingProxyType({}),
    ) -> None:
        """Bring all ranks to ready; on any failure, or interrupt, none of them is left.

        Raises ValueError if the config or the model is at fault, else StartError.
        """
        try:
            uninterrupted(lambda: self._start(show_progress, timeout_s, first), self._give_up)
        except BaseException:
            self.close()  # an interrupt may have come once the ranks were ready
            raise

    def _start(
        self, show_progress: bool, timeout_s: float, first: Mapping[int, Sequence[RankRequest]]
    ) -> None:
        try:
            limits, seats = SilenceLimits.while_starting(self._config), self._ranks.seats
            watch = RankWatch(seats, limits, lambda ranks, text: self._give_up(text))
            self._supervisor.watch, deadline = watch, Deadline(timeout_s)
            self._check_owner()
            self._epochs.prepare(seats, deadline)
            with ProgressBar("load", 0, "byte", show_progress) as bar:
                show = lambda: show_loading(bar, watch.healths)  # noqa: E731
                self.model = self._epochs.load(seats, deadline, show)[0]
            for dp_rank, requests in first.items():
                self._supervisor.submit(dp_rank, requests)
            with ProgressBar("capture", 0, "graph", show_progress) as bar:
                attach_s = self._config.start_timeout_s
                self._epochs.begin(deadline, attach_s, lambda: show_capture(bar, watch.healths))
            self._supervisor.serve(watch)
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
        phase = self._supervisor.state.phase
        if phase is Phase.CLOSED:
            return "the engine is closed"
        return self._given_up if phase is Phase.STARTING else ""

    @property
    def members(self) -> Membership:
        return self._ranks.members

    @property
    def wanted(self) -> Membership:
        return self._supervisor.changes.wanted

    @property
    def num_standbys(self) -> int:
        return self.standbys.num_warm

    def listen(self, listeners: Listeners) -> None:
        self._supervisor.listen(listeners)

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        """Give requests to a rank; one whose rank is lost waits for the engine's next answer."""
        self._check_owner()
        self._supervisor.submit(dp_rank, requests)

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self._check_owner()
        self._supervisor.tell(dp_rank, Abort(request_ids))

    def recall(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self._check_owner()
        self._supervisor.tell(dp_rank, Recall(request_ids))

    def health(self, timeout_s: float = STATUS_S) -> tuple[RankHealth, ...]:
        if not self.belongs_here:
            return tuple(in_child(seat.dp_rank, self._owner) for seat in self._ranks.seats)
        return health_of_all(self._ranks, timeout_s)

    def change(self, target: Membership) -> None:
        """Have these ranks serve from now on; Supervisor.change says what it raises."""
        self._check_owner()
        interrupted = threading.Event()
        why_not = lambda: "it was interrupted" if interrupted.is_set() else ""  # noqa: E731
        uninterrupted(lambda: self._supervisor.change(target, why_not), interrupted.set)

    def trace(self) -> tuple[StepTrace, ...]:
        self._check_owner()
        return trace_of_all(self._ranks)

    def totals(self) -> tuple[Totals, ...]:
        self._check_owner()
        return self._supervisor.until_answered(lambda: totals_of_all(self._ranks))

    def flight_record(self) -> FlightDump:
        self._check_owner()
        return self._supervisor.take_flight("on demand").read()

    def close(self) -> None:
        """End all ranks; returns once they have ended, whoever began it."""
        if self.belongs_here:
            uninterrupted(self.close_now, self._give_up)

    def close_now(self) -> None:
        """Close in this thread, which an interrupt may end halfway."""
        before, watch = self._supervisor.state, self._supervisor.watch
        if not self._supervisor.advance(Phase.CLOSED):
            self._ended.wait(STOP_S + THREADS_END_S)
            return
        try:
            if before.phase < Phase.FAILED and not before.recovering:
                # else there is no step that they could end together
                leave_together(self._ranks, watch, lambda: bool(self._given_up))
        finally:
            self._end()

    def _check_owner(self) -> None:
        if not self.belongs_here:
            raise RankFailed(in_child(0, self._owner).error)

    def _end(self) -> None:
        self._supervisor.advance(Phase.CLOSED)
        self._over.set()
        if self._supervisor.watch is not None:
            self._supervisor.watch.end()
        self._flight.finish()
        self._ranks.kill()
        self._supervisor.end()
        self._epochs.end()
        self._flight.forget()
        self._ranks.launcher.release()
        self._ended.set()
