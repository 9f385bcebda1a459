"""AsyncRequestHandle and AsyncRequestStream: a running request, as a task of asyncio holds it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from dp_runtime.core.request import RankRequest, RequestDelta, RequestOutput, TokenLogprob
from dp_runtime.engine.delta_queue import DeltaQueue
from dp_runtime.engine.output_processor import Delivery, Ends, deliver_here
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.errors import fresh


class AsyncRequestHandle:
    """A submitted request: await its result, iterate over its deltas, or abort it.

    It belongs to the event loop in which it was made, and only that loop's thread uses it.
    """

    def __init__(self, log: RequestLog, ends: Ends, news: asyncio.Event) -> None:
        self.loop = asyncio.get_running_loop()
        self.news = news  # set when something has come, for any of those submitted together
        self._log = log
        self._ends = ends
        self._deltas = DeltaQueue()
        self._ended = asyncio.Event()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None

    @property
    def request(self) -> RankRequest:
        return self._log.request

    @property
    def request_id(self) -> int:
        return self._log.request_id

    @property
    def dp_rank(self) -> int:
        return self._log.dp_rank

    @property
    def num_cached_tokens(self) -> int:
        """Count the prompt's tokens that were not computed for it; known with the first token."""
        return self._log.num_cached_tokens

    @property
    def arrivals(self) -> Sequence[tuple[float, int]]:  # time.monotonic(), number of tokens
        return self._log.arrivals

    @property
    def prompt_logprobs(self) -> Sequence[TokenLogprob]:
        return self._log.prompt_logprobs

    @property
    def done(self) -> bool:
        return self._output is not None or self._error is not None

    @property
    def output(self) -> RequestOutput | None:
        return self._output

    async def result(self) -> RequestOutput:
        """Return the finished request, or raise why it failed; cancellation aborts it."""
        try:
            await self._ended.wait()
        except asyncio.CancelledError:
            self.abort()
            raise
        if self._error:
            raise fresh(self._error)
        assert self._output is not None, "a request without an error has an output"
        return self._output

    def abort(self) -> None:
        """End the request where it is; its result says `abort` unless it was already done."""
        if not self.done:
            self._ends.abort(self.request_id)

    def abandon(self) -> None:
        if not self.done:
            self._ends.abandon(self.request_id)

    async def next_delta(self) -> RequestDelta | None:
        """Return the next delta once there is one, None after the last; cancellation aborts."""
        while (delta := self.take_delta()) is None and not self.done:
            self.news.clear()
            try:
                await self.news.wait()
            except asyncio.CancelledError:
                self.abort()
                raise
        return delta

    def take_delta(self) -> RequestDelta | None:
        """Return a delta that has come, if any; raises why the request failed."""
        if self._deltas:
            return self._deltas.take()
        if self._error:
            raise fresh(self._error)
        return None

    def put(self, delta: RequestDelta, output: RequestOutput | None) -> None:
        if self._error is None:
            self._deltas.put(delta)
            self._output = output
            self._tell()

    def fail(self, error: BaseException) -> None:
        if not self.done:
            self._error = error
            self._tell()

    def disown(self, error: BaseException) -> None:
        if not self.done:
            self._error = error

    def _tell(self) -> None:
        self.news.set()
        if self.done:
            self._ended.set()


class AsyncRequestStream(AsyncIterator[RequestDelta]):
    """Iterates over the deltas of a request, and aborts it when it is left early."""

    def __init__(self, handle: AsyncRequestHandle) -> None:
        self.handle = handle

    async def __anext__(self) -> RequestDelta:
        delta = await self.handle.next_delta()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def close(self) -> None:
        self.handle.abort()

    def __del__(self) -> None:
        self.handle.abandon()


def deliver_in_loops(deliveries: Sequence[Delivery]) -> None:
    """Wake each event loop once for all that is for its requests."""
    by_loop: dict[asyncio.AbstractEventLoop, list[Delivery]] = {}
    for delivery in deliveries:
        assert isinstance(delivery.sink, AsyncRequestHandle), "an async engine's own requests"
        by_loop.setdefault(delivery.sink.loop, []).append(delivery)
    for loop, own in by_loop.items():
        try:
            loop.call_soon_threadsafe(deliver_here, own)
        except RuntimeError:  # the loop was closed: nobody reads these requests any more
            _abort_all(own)


def _abort_all(deliveries: Sequence[Delivery]) -> None:
    for delivery in deliveries:
        if not delivery.ends:
            assert isinstance(delivery.sink, AsyncRequestHandle), "as above"
            delivery.sink.abort()
