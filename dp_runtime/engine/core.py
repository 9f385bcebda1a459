"""EngineCore: the driver's side of the ranks, which every kind of engine is a face of."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from math import inf
from typing import TypeVar

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership, Transition
from dp_runtime.core.rank_events.kv_events import KvEvent
from dp_runtime.core.rank_events.listeners import Listeners, Resume
from dp_runtime.core.request import FinishReason, RequestUpdate
from dp_runtime.engine.deadlines import Deadlines
from dp_runtime.engine.engine_metrics import EngineMetrics
from dp_runtime.engine.inputs import NewRequest, RequestFactory, checked_flag, checked_seconds
from dp_runtime.engine.kv_event_feed import KvEventFeed
from dp_runtime.engine.lifetime import EngineInChild, bind_lifetime, weakly
from dp_runtime.engine.metrics_export import export_periodically
from dp_runtime.engine.output_processor import Delivery, Ends, OutputProcessor, OutputSink, apply
from dp_runtime.engine.rank_group import start_ranks
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.engine.routing.admission import Admission, Place
from dp_runtime.engine.routing.load_balancer import Demand
from dp_runtime.engine.routing.membership_changes import MembershipChanges
from dp_runtime.engine.routing.own_routing import load_balancer
from dp_runtime.engine.routing.queue_moves import RankLimits
from dp_runtime.engine.routing.rank_caches import RankCaches, prompt_pages
from dp_runtime.engine.routing.relocation import Relocation
from dp_runtime.errors import EngineClosed, fresh, require
from dp_runtime.flight.record import FlightDump
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.startup.execution_choices import page_hasher
from dp_runtime.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Deliver = Callable[[Sequence[Delivery]], None]
Sink = TypeVar("Sink", bound=OutputSink)
SinkOf = Callable[[RequestLog, Ends], Sink]


class EngineCore:
    """Starts ranks, gives them requests, and delivers what they report to each request's sink.

    `deliver` gets all that a rank reports in one poll, in the thread that asks this rank.
    """

    def __init__(self, config: EngineConfig, show_progress: bool, deliver: Deliver) -> None:
        ok, allowed = isinstance(config, EngineConfig), "an EngineConfig, as EngineConfig('path')"
        require(ok, "config", config, allowed)
        self.config = config = config.copied()
        self._deliver = deliver
        self._group = start_ranks(config, checked_flag("show_progress", show_progress))
        model = self._group.model
        try:
            text = model.tokenizer_json
            self.tokenizer = None if text is None else Tokenizer(text)
        except BaseException:
            self._group.close()
            raise
        self.factory = RequestFactory(model, self.tokenizer, config.seed, self._group)
        balancer = load_balancer(config.routing)
        limits = RankLimits(config.max_num_requests, config.page_size, config.max_moves)
        members = self._group.members
        copies = config.prefix_state_strategy == "extra_buffer"
        caches = RankCaches(model.keeps_state, copies_states=copies)
        self._admission = Admission(balancer, members, config.max_queued_requests, limits, caches)
        self.changes = MembershipChanges(self._group, self._admission, weakly(self.check_open))
        names_pages = balancer.reads_caches and model.caches_prefixes
        self._page_names = page_hasher(config) if names_pages else None
        self._outputs = OutputProcessor()
        self._deadlines = Deadlines(weakly(self._on_due))
        self._lock = threading.Lock()
        self._sending = threading.RLock()  # held from a request's log to its submission
        self._closed: BaseException | None = None
        self._metrics = EngineMetrics(self._group)
        self._relocation = Relocation(
            self._group, self._admission, self._outputs, self._sending, self._metrics.of
        )
        self.kv_events = KvEventFeed(config.kv_events)
        progress, failure = weakly(self._on_updates), weakly(self._on_failure)
        change, load = weakly(self._on_transition), weakly(self._relocation.report)
        self._group.listen(Listeners(progress, failure, change, load, weakly(self._on_kv_events)))
        bind_lifetime(self, self._group, self._deadlines)
        if config.launcher == "ray":
            export_periodically(self)
        logger.info(
            "%s on %d ranks (%s): requests go by %s, at most %d are unfinished, %d tokens at most",
            model.architecture, config.dp_size, config.launcher, config.routing,
            config.max_queued_requests, model.max_model_len,
        )  # fmt: skip

    @property
    def model(self) -> ModelInfo:
        return self._group.model

    @property
    def members(self) -> Membership:
        return self._group.members

    @property
    def num_standbys(self) -> int:
        return self._group.num_standbys

    @property
    def num_unfinished(self) -> int:
        return self._admission.num_unfinished

    @property
    def has_failed(self) -> bool:
        return self._closed is not None and not isinstance(self._closed, EngineClosed)

    def check_open(self) -> None:
        if self._closed is not None:
            raise fresh(self._closed)

    def check_place(self) -> None:
        self._admission.check_place()

    def start(self, new: NewRequest, sink_of: SinkOf[Sink]) -> Sink:
        """Give a request to a rank; without a place for it raise EngineOverloaded."""
        demand = self._demand_of(new)
        self._admission.enter(demand)
        return self._begin(new, demand, sink_of)

    def wait_for_place(self, new: NewRequest) -> Place:
        """Queue for a place; the caller starts the request there or gives the place back."""
        return self._admission.wait(self._demand_of(new))

    def give_back(self, place: Place) -> None:
        self._admission.give_back(place)

    def start_at(self, place: Place, new: NewRequest, sink_of: SinkOf[Sink]) -> Sink:
        """Give a request to the rank of a place that it has waited for, or is late to wait for."""
        self._admission.take(place)
        return self._begin(new, place.demand, sink_of)

    def _demand_of(self, new: NewRequest) -> Demand:
        digests = () if self._page_names is None else prompt_pages(new.request, self._page_names)
        return Demand.of(new.request, new.dp_rank, digests)

    def _begin(self, new: NewRequest, demand: Demand, sink_of: SinkOf[Sink]) -> Sink:
        with self._sending:
            try:
                rank = self._admission.settled(demand)
                log = RequestLog(new.request, self._metrics.of(rank), self.tokenizer, demand)
                sink = sink_of(log, self)
                with self._lock:
                    self.check_open()
                    self._outputs.add(log, sink)
                    self._metrics.clock.enter()
            except BaseException:
                self._admission.leave(demand)
                raise
            late = new.seconds_left == 0
            if not late:
                self._submit(log, rank, new)
        if late:
            self._on_due({log.request_id: FinishReason.TIMEOUT})
        return sink

    def _submit(self, log: RequestLog, rank: int, new: NewRequest) -> None:
        if new.deadline < inf:
            self._deadlines.add(log.request_id, new.deadline, FinishReason.TIMEOUT)
        try:
            self._group.submit(rank, [new.request])
        except BaseException:
            if self._outputs.remove(log.request_id):  # else it was counted as it ended
                self._count_out(log)
            raise

    def abort(self, request_id: int) -> None:
        log = self._outputs.get(request_id)
        if log is not None:
            with self._sending:
                log.abort_asked = True
                self._deadlines.abort_soon(request_id)
                self._group.abort(log.dp_rank, [request_id])

    def abandon(self, request_id: int) -> None:
        """Abort a request that nobody holds any more; for the collection of garbage."""
        self._deadlines.add(request_id, 0.0, FinishReason.ABORT)

    def step_trace(self) -> tuple[StepTrace, ...]:
        self.check_open()
        return self._group.trace()

    def report(self) -> Report:
        self.check_open()
        return self._metrics.report()

    def health(self, timeout_s: float) -> tuple[RankHealth, ...]:
        if isinstance(self._closed, EngineClosed):
            raise fresh(self._closed)
        return self._group.health(checked_seconds("timeout_s", timeout_s))

    def metrics(self, timeout_s: float) -> tuple[RankSnapshot, ...]:
        if isinstance(self._closed, EngineClosed):
            raise fresh(self._closed)
        return self._metrics.snapshots(checked_seconds("timeout_s", timeout_s))

    def flight_record(self) -> FlightDump:
        if isinstance(self._closed, EngineClosed):
            raise fresh(self._closed)
        return self._group.flight_record()

    def export_metrics(self) -> bool:
        is_open = self._closed is None
        if is_open:
            self._metrics.export()
        return is_open

    def close(self) -> None:
        if isinstance(self._closed, EngineInChild):
            return
        self._end(EngineClosed("the engine is closed"))
        self.factory.close()
        self._group.close()

    def disown(self, error: EngineInChild) -> None:
        self._closed = error
        self._lock, self._sending = threading.Lock(), threading.RLock()
        self._outputs.disown(error)

    def _on_updates(self, dp_rank: int, updates: Sequence[RequestUpdate]) -> None:
        with self._outputs.delivering():
            deliveries = self._outputs.process(self._relocation.settled(dp_rank, updates))
            if running := [each.log.request_id for each in deliveries if each.rank_goes_on]:
                self._group.abort(dp_rank, running)
            if begun := [each.log for each in deliveries if each.begins]:
                self._metrics.of(dp_rank).add_cached(*self._admission.begun(begun))
            self._count_ended(deliveries)
            self._deliver(deliveries)

    def _on_kv_events(self, dp_rank: int, events: Sequence[KvEvent]) -> None:
        self._admission.cached(dp_rank, events)
        self.kv_events.add(dp_rank, events)

    def _on_due(self, reasons: Mapping[int, FinishReason]) -> None:
        """End requests at once with what they have, whether their ranks answer or not.

        NOTE: what delivers may wait for `_sending`, so nobody who holds it waits for deliveries.
        """
        deliveries = []
        taken = self._outputs.take(reasons)
        with self._sending:  # no rank gets them anew meanwhile
            for log, sink in taken:
                delivery = apply(log, sink, log.end_here(reasons[log.request_id]))
                assert delivery is not None, "what ends a request is told"
                deliveries.append(delivery)
                self._group.abort(log.dp_rank, [log.request_id])
        self._count_ended(deliveries)
        self._deliver(deliveries)

    def _count_ended(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if delivery.ends:
                with self._lock:
                    delivery.log.end(delivery.finish_reason)
                self._count_out(delivery.log)

    def _count_out(self, log: RequestLog) -> None:
        self._deadlines.remove(log.request_id)
        with self._lock:
            self._metrics.clock.leave()
        self._admission.leave(log.demand)

    def _on_transition(self, transition: Transition, resume: Resume) -> int:
        """Have the next ranks go on with what others had; nobody submits meanwhile.

        Returns how many losses, this one included, were put down to a request.
        """
        self.kv_events.clear(transition.gone)
        ended, num_again, num_blamed = self._relocation.replay(transition, resume)
        if num_again or ended:
            text = "requests of ranks that serve no more: %d go on, %d have ended"
            logger.warning(text, num_again, len(ended))
        self._on_updates(transition.members.dp_ranks[0], ended)
        return num_blamed

    def _on_failure(self, error: BaseException) -> None:
        logger.error("the engine has failed, and all its requests with it: %s", error)
        self._end(error)

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._closed = error
        self._deadlines.close()
        self._admission.close(error)
        self.kv_events.close(error)
        deliveries = self._outputs.fail_all(error)
        self._count_ended(deliveries)
        self._deliver(deliveries)
