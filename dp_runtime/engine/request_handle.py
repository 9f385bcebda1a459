"""RequestHandle and RequestStream: what a user holds of a running request."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from dp_runtime.core.request import RankRequest, RequestDelta, RequestOutput
from dp_runtime.engine.delta_queue import DeltaQueue
from dp_runtime.engine.inputs import checked_seconds
from dp_runtime.engine.output_processor import Ends
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.errors import fresh


class RequestHandle:
    """A submitted request: wait for it, iterate over its deltas, or abort it."""

    def __init__(self, log: RequestLog, ends: Ends) -> None:
        self._log = log
        self._ends = ends
        self._deltas = DeltaQueue()
        self._changed = threading.Condition()
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
    def token_ids(self) -> Sequence[int]:
        return self._log.token_ids

    @property
    def num_cached_tokens(self) -> int:
        """Count the prompt's tokens that were not computed for it; known with the first token."""
        return self._log.num_cached_tokens

    @property
    def arrivals(self) -> Sequence[tuple[float, int]]:  # time.monotonic(), number of tokens
        return self._log.arrivals

    @property
    def done(self) -> bool:
        return self._output is not None or self._error is not None

    @property
    def output(self) -> RequestOutput | None:
        return self._output

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Return the finished request; raises TimeoutError after `timeout` s, or why it failed."""
        seconds = None if timeout is None else checked_seconds("timeout", timeout)
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, seconds):
                raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
            if self._error:
                raise fresh(self._error)
            assert self._output is not None, "a request without an error has an output"
            return self._output

    def abort(self) -> None:
        """End the request where it is; its result says `abort` unless it was already done."""
        self._ends.abort(self.request_id)

    def abandon(self) -> None:
        if not self.done:
            self._ends.abandon(self.request_id)

    def __iter__(self) -> Iterator[RequestDelta]:
        """Iterate over deltas as they come in; the last one has the finish reason."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._deltas or self.done)
                if not self._deltas:
                    if self._error:
                        raise fresh(self._error)
                    return
                delta = self._deltas.take()
            yield delta

    def put(self, delta: RequestDelta, output: RequestOutput | None) -> None:
        with self._changed:
            if self._error is None:
                self._deltas.put(delta)
                self._output = output
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            if not self.done:
                self._error = error
                self._changed.notify_all()

    def disown(self, error: BaseException) -> None:
        self._changed = threading.Condition()
        if not self.done:
            self._error = error


class RequestStream:
    """Iterates over the deltas of a request, and aborts it when it is left early."""

    def __init__(self, handle: RequestHandle) -> None:
        self._handle = handle
        self._deltas = iter(handle)

    def __iter__(self) -> RequestStream:
        return self

    def __next__(self) -> RequestDelta:
        return next(self._deltas)

    def close(self) -> None:
        self._handle.abort()

    def __del__(self) -> None:
        self._handle.abandon()
