"""A clock that stands still while this process is paused."""

from __future__ import annotations

import time

LOOK_EVERY_S = 0.25  # how often who waits by this clock must look at it
_PAUSE_S = 1.0  # more time than this between two looks is a pause ...
_PAUSE_COUNTS_S = 0.1  # ... of which this much counts, so that every wait ends


class AwakeClock:
    """Counts seconds without pauses: ranks frozen together do not take each other for lost."""

    def __init__(self) -> None:
        self._now = 0.0
        self._looked = time.monotonic()

    def now(self) -> float:
        at = time.monotonic()
        passed, self._looked = at - self._looked, at
        self._now += passed if passed <= _PAUSE_S else _PAUSE_COUNTS_S
        return self._now


class Deadline:
    """Ends a wait by such a clock."""

    def __init__(self, timeout_s: float) -> None:
        self._clock, self._timeout_s = AwakeClock(), timeout_s

    def left(self) -> float:
        # NOTE: look every LOOK_EVERY_S, or looking late counts as a pause.
        return self._timeout_s - self._clock.now()
