"""CompileQueue: requests whose grammars are compiled before the step loop hears of them."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from dp_runtime.core.request import RankRequest
from dp_runtime.core.structured_outputs import StructuredOutputs
from dp_runtime.structured.structured_state import StructuredState

Use = Callable[[RankRequest], None]
Entry = tuple[RankRequest, Use]


class CompileQueue:
    """Compiles for one request after the other, in a thread that ends with the last of them.

    Different grammars take turns, so that many requests for one hold up no others.
    """

    def __init__(self, structured: StructuredState) -> None:
        self._structured = structured
        self._lock = threading.Lock()
        self._waiting: OrderedDict[StructuredOutputs | None, deque[Entry]] = OrderedDict()
        self._current: Entry | None = None
        self._running = False

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._waiting.values())) + (self._current is not None)

    def put(self, request: RankRequest, forward: Use) -> None:
        """Call `forward` with the request once its grammar is compiled."""
        with self._lock:
            wanted = request.params.structured_outputs
            self._waiting.setdefault(wanted, deque()).append((request, forward))
            if not self._running:
                self._running = True
                threading.Thread(target=self._run, name="compile-grammars", daemon=True).start()

    def release(self, request_ids: Sequence[int]) -> None:
        """Forward these requests at once, for they are to end."""
        with self._lock:
            released = []
            if self._current is not None and self._current[0].request_id in request_ids:
                released, self._current = [self._current], None
            for wanted, waiting in list(self._waiting.items()):
                released += [each for each in waiting if each[0].request_id in request_ids]
                kept = deque(each for each in waiting if each[0].request_id not in request_ids)
                self._waiting[wanted] = kept
                if not kept:
                    del self._waiting[wanted]
        for request, forward in released:
            forward(request)

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            request, forward = entry
            self._structured.compile_early(request)
            with self._lock:
                released, self._current = self._current is not entry, None
            if released:
                self._structured.forget([request.request_id])
            else:
                forward(request)

    def _next(self) -> Entry | None:
        with self._lock:
            if not self._waiting:
                self._running = False
                return None
            wanted, waiting = self._waiting.popitem(last=False)
            self._current = waiting.popleft()
            if waiting:
                self._waiting[wanted] = waiting  # behind the others
            return self._current
