"""KvEventFeed: what enters and leaves the prefix caches of all ranks, for who follows them."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from time import time

from dp_runtime.core.rank_events.kv_events import (
    AllBlocksCleared,
    KvEvent,
    KvEventBatch,
    PendingKvEvents,
    StateRemoved,
    StateStored,
)
from dp_runtime.errors import fresh, require


class KvEventFeed:
    """Keeps changes until they are taken: who is late gets fewer, and who comes late all pages."""

    def __init__(self, is_on: bool) -> None:
        self._is_on = is_on
        self._ranks: defaultdict[int, PendingKvEvents] = defaultdict(PendingKvEvents)
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    def add(self, dp_rank: int, events: Sequence[KvEvent]) -> None:
        if not self._is_on:
            return
        told = [each for each in events if not isinstance(each, StateStored | StateRemoved)]
        with self._changed:
            self._ranks[dp_rank].add(told)
            self._changed.notify_all()

    def clear(self, dp_ranks: Collection[int]) -> None:
        for dp_rank in dp_ranks:
            self.add(dp_rank, [AllBlocksCleared()])

    def close(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def wait(self, timeout_s: float) -> None:
        """Return when there are changes, at the end, or after so long."""
        require(self._is_on, "kv_events", self._is_on, "True, for ranks to tell of their caches")
        with self._changed:
            self._changed.wait_for(lambda: self._error or any(self._ranks.values()), timeout_s)

    def take(self, timeout_s: float) -> tuple[KvEventBatch, ...]:
        """Return a batch for each rank with changes, and none after so long without any."""
        self.wait(timeout_s)
        with self._changed:
            if self._error is not None:
                raise fresh(self._error)
            now = time()
            return tuple(
                KvEventBatch(now, pending.take(), dp_rank)
                for dp_rank, pending in sorted(self._ranks.items())
                if pending
            )
