"""Admission of requests: choosing their ranks, and bounding how many are unfinished."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dp_runtime.errors import QueueFull, fresh


@dataclass
class Outstanding:
    requests: int = 0
    tokens: int = 0  # prompt and, at most, output tokens


class LoadBalancer(Protocol):
    """Chooses a rank for a request of so many tokens that is not pinned to one."""

    def choose(self, ranks: Sequence[Outstanding], tokens: int) -> int: ...


class RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def choose(self, ranks: Sequence[Outstanding], tokens: int) -> int:
        rank = self._next % len(ranks)
        self._next = rank + 1
        return rank


class LeastTokens:
    def choose(self, ranks: Sequence[Outstanding], tokens: int) -> int:
        return min(range(len(ranks)), key=lambda rank: (ranks[rank].tokens, rank))


class LeastPaddedCost:
    """A decode step costs the largest rank's requests on every rank: keep that number low."""

    def choose(self, ranks: Sequence[Outstanding], tokens: int) -> int:
        largest = max(each.requests for each in ranks)

        def cost(rank: int) -> tuple[int, int, int]:
            return max(largest, ranks[rank].requests + 1), ranks[rank].tokens, rank

        return min(range(len(ranks)), key=cost)


LOAD_BALANCERS: dict[str, type[LoadBalancer]] = {
    "round_robin": RoundRobin,
    "least_tokens": LeastTokens,
    "least_padded_cost": LeastPaddedCost,
}


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
