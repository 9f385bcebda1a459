"""Deadlines: which requests are to end now, although nobody waits to say so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from math import inf
from time import monotonic

from dp_runtime.core.request import FinishReason

ABORT_S = 0.5  # for a rank to say where a request has ended, else it ends with what was delivered


class Deadlines:
    """Tells, in a thread of its own, of requests whose time is over, and why they end.

    NOTE: `add` may be called by the collection of garbage, in a thread that holds any lock.
    """

    def __init__(self, on_due: Callable[[Mapping[int, FinishReason]], None]) -> None:
        self._on_due = on_due
        self._due: dict[int, tuple[float, FinishReason]] = {}  # by request id: time.monotonic()
        self._look_at = inf  # when the thread looks again
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
        self._thread.start()

    def add(self, request_id: int, at: float, reason: FinishReason) -> None:
        """End a request then, unless it is to end before."""
        with self._changed:
            before = self._due.get(request_id)
            if before is None or at < before[0]:
                self._due[request_id] = at, reason
            if at < self._look_at:
                self._changed.notify()

    def abort_soon(self, request_id: int) -> None:
        """End a request that its rank is told to end, and may not be able to."""
        self.add(request_id, monotonic() + ABORT_S, FinishReason.ABORT)

    def remove(self, request_id: int) -> None:
        with self._changed:
            self._due.pop(request_id, None)

    def close(self) -> None:
        """Tell of nothing any more; does not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while due := self._wait():
            self._on_due(due)

    def _wait(self) -> Mapping[int, FinishReason]:
        """Return the next requests that are due, once there are some; none after `close`."""
        with self._changed:
            while not self._closed:
                now, due = monotonic(), list(self._due.items())
                if ended := {each: reason for each, (at, reason) in due if at <= now}:
                    for request_id in ended:
                        del self._due[request_id]
                    return ended
                self._look_at = min(self._due.values())[0] if due else inf
                self._changed.wait(self._look_at - now if due else None)
        return {}
