"""Deadlines: which requests are late."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from time import monotonic


class Deadlines:
    """Tells of requests whose time is over, in a thread that the first deadline starts."""

    def __init__(self, on_late: Callable[[Sequence[int]], None]) -> None:
        self._on_late = on_late
        self._due: dict[int, float] = {}  # request id: time.monotonic()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def add(self, request_id: int, at: float) -> None:
        with self._changed:
            self._due[request_id] = at
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deadlines", daemon=True)
                self._thread.start()
            if at <= min(self._due.values()):
                self._changed.notify()

    def remove(self, request_id: int) -> None:
        with self._changed:
            self._due.pop(request_id, None)

    def close(self) -> None:
        """Tell of nothing any more; does not wait."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while late := self._wait():
            self._on_late(late)

    def _wait(self) -> Sequence[int]:
        """Return the next late requests, once there are some; none after `close`."""
        with self._changed:
            while not self._closed:
                now = monotonic()
                if late := [each for each, at in self._due.items() if at <= now]:
                    for request_id in late:
                        del self._due[request_id]
                    return late
                self._changed.wait(min(self._due.values()) - now if self._due else None)
        return ()
