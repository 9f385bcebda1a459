"""Load balancers: they choose the rank of a request that is not pinned to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass
class Outstanding:
    requests: int = 0
    tokens: int = 0  # prompt and, at most, output tokens


class LoadBalancer(Protocol):
    """Chooses a rank for a request of so many tokens that is not pinned to one."""

    def choose(self, ranks: Mapping[int, Outstanding], tokens: int) -> int: ...  # by dp_rank


class RoundRobin:
    def __init__(self) -> None:
        self._next = 0

    def choose(self, ranks: Mapping[int, Outstanding], tokens: int) -> int:
        rank = next((rank for rank in ranks if rank >= self._next), min(ranks))
        self._next = rank + 1
        return rank


class LeastTokens:
    def choose(self, ranks: Mapping[int, Outstanding], tokens: int) -> int:
        return min(ranks, key=lambda rank: (ranks[rank].tokens, rank))


class LeastPaddedCost:
    """A decode step costs the largest rank's requests on every rank: keep that number low."""

    def choose(self, ranks: Mapping[int, Outstanding], tokens: int) -> int:
        largest = max(each.requests for each in ranks.values())

        def cost(rank: int) -> tuple[int, int, int]:
            return max(largest, ranks[rank].requests + 1), ranks[rank].tokens, rank

        return min(ranks, key=cost)


LOAD_BALANCERS: dict[str, type[LoadBalancer]] = {
    "round_robin": RoundRobin,
    "least_tokens": LeastTokens,
    "least_padded_cost": LeastPaddedCost,
}
