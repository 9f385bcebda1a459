"""OutputProcessor: turns what ranks report into what the users of requests get."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from dp_runtime.core.request import FinishReason, RequestDelta, RequestOutput, RequestUpdate
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.errors import RequestFailed

logger = logging.getLogger(__name__)


class OutputSink(Protocol):
    """Takes the outputs of one request, and must not block whoever delivers them."""

    def put(self, delta: RequestDelta, output: RequestOutput | None) -> None: ...

    def fail(self, error: BaseException) -> None: ...

    def disown(self, error: BaseException) -> None:
        """Fail in a forked child, without a lock that a thread may have held at the fork."""


Live = tuple[RequestLog, OutputSink]


class Ends(Protocol):
    """Ends requests where they are."""

    def abort(self, request_id: int) -> None: ...

    def abandon(self, request_id: int) -> None:
        """Abort without waiting for a lock that whoever collects garbage may hold."""


@dataclass(frozen=True)
class Delivery:
    log: RequestLog
    sink: OutputSink
    news: RequestDelta | BaseException
    output: RequestOutput | None = None  # with the last delta
    rank_goes_on: bool = False  # although the request has ended
    begins: bool = False  # with the first token of its rank

    @property
    def ends(self) -> bool:
        return self.output is not None or isinstance(self.news, BaseException)

    @property
    def finish_reason(self) -> FinishReason:  # of one that ends
        return FinishReason.ERROR if self.output is None else self.output.finish_reason

    def deliver(self) -> None:
        if isinstance(self.news, BaseException):
            self.sink.fail(self.news)
        else:
            self.sink.put(self.news, self.output)


def deliver_here(deliveries: Sequence[Delivery]) -> None:
    for delivery in deliveries:
        delivery.deliver()


class OutputProcessor:
    """Applies ranks' updates to the logs of live requests: text, stop strings, deltas.

    The updates of one rank must come one after the other. No lock is held while text is made.
    """

    def __init__(self) -> None:
        self._live: dict[int, Live] = {}
        self._lock = threading.Lock()  # of adding and removing
        self._under_way: set[object] = set()
        self._done = threading.Condition()

    def get(self, request_id: int) -> RequestLog | None:
        live = self._live.get(request_id)
        return None if live is None else live[0]

    def add(self, log: RequestLog, sink: OutputSink) -> None:
        with self._lock:
            self._live[log.request_id] = (log, sink)

    def remove(self, request_id: int) -> bool:
        """Return False if the request is not live any more."""
        with self._lock:
            return self._live.pop(request_id, None) is not None

    @contextmanager
    def delivering(self) -> Iterator[None]:
        """Hold off `take` until what is processed here has been delivered."""
        this = object()
        with self._done:
            self._under_way.add(this)
        try:
            yield
        finally:
            with self._done:
                self._under_way.remove(this)
                self._done.notify_all()

    def take(self, request_ids: Collection[int]) -> list[Live]:
        """Return those that were live; nothing is, or will be, delivered to them by others."""
        with self._lock:
            found = [self._live.pop(each) for each in request_ids if each in self._live]
        with self._done:
            before = {*self._under_way}
            self._done.wait_for(lambda: before.isdisjoint(self._under_way))
        return found

    def of_ranks(self, dp_ranks: Collection[int]) -> list[RequestLog]:
        """Return the live requests of some ranks in the order of their arrival."""
        with self._lock:
            return [log for log, _ in self._live.values() if log.dp_rank in dp_ranks]

    def process(self, updates: Sequence[RequestUpdate]) -> list[Delivery]:
        """Apply what a rank reports; an error in one request ends that request and no other."""
        deliveries = []
        for update in updates:
            live = self._live.get(update.request_id)
            if live is None:
                continue  # NOTE: ended by a stop string; the rank has not heard of it yet
            delivery = apply(*live, update)
            if delivery is not None and (not delivery.ends or self.remove(update.request_id)):
                deliveries.append(delivery)
        return deliveries

    def disown(self, error: BaseException) -> None:
        """Fail all requests in a forked child, where a lock may be held for good."""
        self._lock, live = threading.Lock(), self._live
        self._live = {}
        for _, sink in live.values():
            sink.disown(error)

    def fail_all(self, error: BaseException) -> list[Delivery]:
        """End all live requests; returns what to tell them."""
        with self._lock:
            live, self._live = self._live, {}
        return [Delivery(log, sink, error) for log, sink in live.values()]


def apply(log: RequestLog, sink: OutputSink, update: RequestUpdate) -> Delivery | None:
    """Apply an update; None if it brings nothing for the user."""
    if update.error:
        return Delivery(log, sink, RequestFailed(f"request {log.request_id}: {update.error}"))
    rank_goes_on, awaited = update.finish_reason is None, log.awaits_token
    try:
        delta = log.apply(update)
    except Exception as error:
        logger.exception("request %d failed on the driver", log.request_id)
        failed = RequestFailed(f"request {log.request_id}: {type(error).__name__}: {error}")
        return Delivery(log, sink, failed, None, rank_goes_on)
    if delta is None:
        return None
    begins = awaited and not log.awaits_token
    return Delivery(log, sink, delta, log.output, rank_goes_on and log.output is not None, begins)
