"""Admission of requests: each gets a rank, and so many may be unfinished."""

from __future__ import annotations

import threading

from dp_runtime.engine.load_balancer import LoadBalancer, Outstanding
from dp_runtime.errors import QueueFull, fresh


class Admission:
    """Gives new requests to ranks, and bounds how many are unfinished."""

    def __init__(self, balancer: LoadBalancer, dp_size: int, limit: int) -> None:
        self._balancer = balancer
        self._ranks = [Outstanding() for _ in range(dp_size)]
        self._limit = limit
        self._changed = threading.Condition()
        self._closed: BaseException | None = None

    @property
    def num_unfinished(self) -> int:
        return sum(rank.requests for rank in self._ranks)

    def enter(self, tokens: int, dp_rank: int | None, wait: bool) -> int:
        """Return the rank of a new request; waits for a place, or raises QueueFull."""
        with self._changed:
            while self.num_unfinished >= self._limit and not self._closed:
                if not wait:
                    raise QueueFull(f"{self._limit} requests are unfinished (max_queued_requests)")
                self._changed.wait()
            if self._closed:
                raise fresh(self._closed)
            rank = self._balancer.choose(self._ranks, tokens) if dp_rank is None else dp_rank
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
