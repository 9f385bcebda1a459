"""The control plane's choices: which rank serves a request, and how many may be unfinished."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dp_runtime.errors import QueueFull


@dataclass
class RankQueue:
    """What the engine has given a rank and not got back."""

    requests: int = 0
    tokens: int = 0  # prompt and, at most, output tokens


class Router(Protocol):
    """Chooses a rank for a request that is not pinned to one."""

    def choose(self, queues: Sequence[RankQueue], tokens: int) -> int:
        """The rank for a request of so many tokens; `queues` are [rank]."""


class RoundRobin:
    """One rank after the other, whatever they have."""

    def __init__(self) -> None:
        self._next = 0

    def choose(self, queues: Sequence[RankQueue], tokens: int) -> int:
        rank = self._next % len(queues)
        self._next = rank + 1
        return rank


class LeastTokens:
    """The rank with the fewest unfinished tokens."""

    def choose(self, queues: Sequence[RankQueue], tokens: int) -> int:
        return min(range(len(queues)), key=lambda rank: (queues[rank].tokens, rank))


class LeastPaddedCost:
    """The rank that adds the fewest padded rows to a decode step; then the fewest tokens.

    A decode step of all ranks costs the largest rank's requests on every rank.
    """

    def choose(self, queues: Sequence[RankQueue], tokens: int) -> int:
        most = max(queue.requests for queue in queues)

        def cost(rank: int) -> tuple[int, int, int]:
            return max(most, queues[rank].requests + 1), queues[rank].tokens, rank

        return min(range(len(queues)), key=cost)


ROUTERS: dict[str, type[Router]] = {
    "round_robin": RoundRobin,
    "least_tokens": LeastTokens,
    "least_padded_cost": LeastPaddedCost,
}


class Admission:
    """Counts unfinished requests per rank, bounds them, and routes new ones."""

    def __init__(self, router: Router, dp_size: int, limit: int) -> None:
        self._router = router
        self._queues = [RankQueue() for _ in range(dp_size)]
        self._limit = limit
        self._changed = threading.Condition()
        self._closed: BaseException | None = None

    @property
    def num_unfinished(self) -> int:
        return sum(queue.requests for queue in self._queues)

    def enter(self, tokens: int, dp_rank: int | None, wait: bool) -> int:
        """Take a place for a request and return its rank.

        Without a free place it waits, or raises QueueFull if `wait` is false.
        """
        with self._changed:
            while self.num_unfinished >= self._limit and not self._closed:
                if not wait:
                    raise QueueFull(f"{self._limit} requests are unfinished (max_queued_requests)")
                self._changed.wait()
            if self._closed:
                raise self._closed
            rank = self._router.choose(self._queues, tokens) if dp_rank is None else dp_rank
            self._queues[rank].requests += 1
            self._queues[rank].tokens += tokens
            return rank

    def leave(self, dp_rank: int, tokens: int) -> None:
        """Give a request's place back."""
        with self._changed:
            self._queues[dp_rank].requests -= 1
            self._queues[dp_rank].tokens -= tokens
            self._changed.notify_all()

    def close(self, error: BaseException) -> None:
        """Refuse everyone from now on, also those that wait."""
        with self._changed:
            self._closed = error
            self._changed.notify_all()
