"""Admission of requests: each gets a rank, and so many may be unfinished."""

from __future__ import annotations

import threading
from bisect import insort
from itertools import count

from dp_runtime.engine.load_balancer import LoadBalancer, Outstanding
from dp_runtime.errors import QueueFull, fresh


class Admission:
    """Gives new requests to ranks, and bounds how many are unfinished."""

    def __init__(self, balancer: LoadBalancer, dp_size: int, limit: int) -> None:
        self._balancer = balancer
        self._ranks = [Outstanding() for _ in range(dp_size)]
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []  # priority and arrival of callers, the first next
        self._arrivals = count()
        self._closed: BaseException | None = None

    @property
    def num_unfinished(self) -> int:
        return sum(rank.requests for rank in self._ranks)

    def enter(self, tokens: int, dp_rank: int | None, wait: bool, priority: int = 0) -> int:
        """Return the rank of a new request; waits for a place, or raises QueueFull."""
        with self._changed:
            if wait:
                self._wait_for_place(priority)
            elif self._full and not self._closed:
                raise QueueFull(f"{self._limit} requests are unfinished (max_queued_requests)")
            if self._closed:
                raise fresh(self._closed)
            rank = self._balancer.choose(self._ranks, tokens) if dp_rank is None else dp_rank
            self._ranks[rank].requests += 1
            self._ranks[rank].tokens += tokens
            return rank

    @property
    def _full(self) -> bool:
        return self.num_unfinished >= self._limit

    def _wait_for_place(self, priority: int) -> None:
        turn = (priority, next(self._arrivals))
        insort(self._waiting, turn)
        try:
            while not self._closed and (self._full or self._waiting[0] != turn):
                self._changed.wait()
        finally:
            self._waiting.remove(turn)
            self._changed.notify_all()

    def move(self, dp_rank: int, tokens: int, pinned: bool) -> int:
        """Return the rank where a request that was on a lost one begins again."""
        with self._changed:
            self._ranks[dp_rank].requests -= 1
            self._ranks[dp_rank].tokens -= tokens
            rank = dp_rank if pinned else self._balancer.choose(self._ranks, tokens)
            self._ranks[rank].requests += 1
            self._ranks[rank].tokens += tokens
            return rank

    def leave(self, dp_rank: int, tokens: int) -> None:
        with self._changed:
            self._ranks[dp_rank].requests -= 1
            self._ranks[dp_rank].tokens -= tokens
            self._changed.notify_all()

    def close(self, error: BaseException) -> None:
        """Refuse everyone from now on, even those that wait."""
        with self._changed:
            self._closed = error
            self._changed.notify_all()
