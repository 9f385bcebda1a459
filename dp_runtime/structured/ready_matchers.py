"""ReadyMatchers: what was compiled for requests that the scheduler has not admitted yet."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_READY = 256  # requests that end in the queue leave theirs behind


class ReadyMatchers:
    """Holds the latest by request id, for two threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._matchers: OrderedDict[int, LLMatcher] = OrderedDict()

    def put(self, request_id: int, matcher: LLMatcher) -> None:
        with self._lock:
            self._matchers[request_id] = matcher
            if len(self._matchers) > MAX_READY:
                self._matchers.popitem(last=False)

    def take(self, request_id: int) -> LLMatcher | None:
        with self._lock:
            return self._matchers.pop(request_id, None)
