"""ReadyMatchers: what was compiled for requests that the scheduler has not admitted yet."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_READY = 256  # of a quarter of a megabyte each


class ReadyMatchers:
    """Holds matchers, or why there is none, by request id; for two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._matchers: dict[int, LLMatcher | Exception] = {}

    @property
    def full(self) -> bool:
        return len(self._matchers) >= MAX_READY

    def put(self, request_id: int, matcher: LLMatcher | Exception) -> None:
        with self._lock:
            self._matchers[request_id] = matcher

    def take(self, request_id: int) -> LLMatcher | None:
        """Return a request's matcher, None if it has none yet; raises why there can't be one."""
        with self._lock:
            found = self._matchers.pop(request_id, None)
        if isinstance(found, Exception):
            raise found
        return found

    def drop(self, request_ids: Iterable[int]) -> None:
        with self._lock:
            for request_id in request_ids:
                self._matchers.pop(request_id, None)
