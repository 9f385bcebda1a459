"""BusyClock: how long an engine had work."""

from __future__ import annotations

from time import monotonic


class BusyClock:
    """Adds up the time during which at least one request was unfinished."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._since = 0.0
        self._elapsed_s = 0.0

    def enter(self) -> None:
        if self._num_inside == 0:
            self._since = monotonic()
        self._num_inside += 1

    def leave(self) -> None:
        self._num_inside -= 1
        if self._num_inside == 0:
            self._elapsed_s += monotonic() - self._since

    @property
    def elapsed_s(self) -> float:
        return self._elapsed_s + (monotonic() - self._since if self._num_inside else 0.0)
