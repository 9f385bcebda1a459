"""Watchdog: notices when a device does not get past what was queued on it."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from dp_runtime.errors import CollectiveAborted, CollectiveTimeout

LOOK_EVERY_S = 0.05


class Completion(Protocol):
    def query(self) -> bool: ...  # whether the device has got past it, as of a CUDA event


@dataclass(frozen=True)
class _Flight:
    what: str
    launched: float
    done: Completion


class Watchdog:
    """Calls on_failure once, from its own thread, if nothing ends within timeout_s.

    It counts from the last end or launch. The failure is a CollectiveTimeout, a CollectiveAborted
    if the device failed, or what `check` raised.
    """

    def __init__(
        self,
        timeout_s: float,
        on_failure: Callable[[RuntimeError], None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._timeout_s, self._on_failure, self._check = timeout_s, on_failure, check
        self._flights: list[_Flight] = []  # in the order of one stream: done ones come first
        self._progress_at = time.monotonic()
        self._over = threading.Event()
        threading.Thread(target=self._watch, name="stall-watch", daemon=True).start()

    def add(self, what: str, done: Completion) -> None:
        self._flights.append(_Flight(what, time.monotonic(), done))

    def arm(self, what: str, device: torch.device) -> None:
        """Watch what the device's current stream was given so far; a capture only records it."""
        if not torch.cuda.is_current_stream_capturing():
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(device))
            self.add(what, done)

    def drain(self, timeout_s: float) -> None:
        """Return once everything is done or the watch is over, after timeout_s at the latest."""
        deadline = time.monotonic() + timeout_s
        while self._flights and time.monotonic() < deadline and not self._over.wait(LOOK_EVERY_S):
            pass

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            try:
                self._check()
            except RuntimeError as error:
                self._on_failure(error)
                return
            try:
                late = self._late()
            except RuntimeError as error:  # the device's; sticky, so every later use meets it too
                self._on_failure(CollectiveAborted(f"the device failed: {error}"))
                return
            if late is not None:
                message = f"{late}: the device did not get past it within {self._timeout_s:g} s"
                self._on_failure(CollectiveTimeout(message))
                return

    def _late(self) -> str | None:
        """Forget what is done; name the operation that holds the device up for too long, if any."""
        flights, now = self._flights, time.monotonic()
        num_done = bisect_left(flights, True, key=lambda flight: not flight.done.query())
        if num_done:
            del flights[:num_done]  # NOTE: the other thread only appends
            self._progress_at = now
        if flights and now - max(self._progress_at, flights[0].launched) > self._timeout_s:
            return flights[0].what
        return None
