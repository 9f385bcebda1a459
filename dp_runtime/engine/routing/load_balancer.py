"""Load balancers: they choose the rank of a request that is not pinned to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from dp_runtime.core.request import RankRequest

BALANCE = 8  # a rank's cache may draw an eighth more requests there than the mean, or one


@dataclass(frozen=True, eq=False)
class Demand:
    """A request as far as its rank is chosen by it."""

    tokens: int  # prompt and, at most, output
    prompt_tokens: int = 1
    dp_rank: int | None = None  # that it is pinned to
    priority: int = 0
    request_id: int = -1
    digests: Sequence[bytes] = ()  # of pages to begin with, where the balancer reads caches

    @classmethod
    def of(cls, request: RankRequest, dp_rank: int | None, digests: Sequence[bytes] = ()) -> Demand:
        tokens, num_prompt = request.num_reserved_tokens, len(request.prompt_token_ids)
        priority = request.params.priority
        return cls(tokens, num_prompt, dp_rank, priority, request.request_id, digests)


@dataclass(frozen=True)
class RankView:
    """What is known of a rank as a request is given to one."""

    requests: int = 0  # unfinished
    tokens: int = 0  # their prompt and, at most, output tokens
    pending_prefill: int = 0  # prompt tokens to compute before each of them has a token
    cached_tokens: int = 0  # of the request's prompt, there or about to be


class LoadBalancer(Protocol):
    """Chooses a rank for a request that is not pinned to one."""

    reads_caches: bool  # else nobody hashes prompts, and `cached_tokens` is 0

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int: ...  # by dp_rank


class RoundRobin:
    reads_caches: bool = False

    def __init__(self) -> None:
        self._next = 0

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        rank = next((rank for rank in ranks if rank >= self._next), min(ranks))
        self._next = rank + 1
        return rank


class LeastTokens:
    reads_caches = False

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        return min(ranks, key=lambda rank: (ranks[rank].tokens, rank))


class LeastPaddedCost:
    """A decode step costs the largest rank's requests on every rank: keep that number low."""

    reads_caches = False

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        largest = max(each.requests for each in ranks.values())

        def cost(rank: int) -> tuple[int, int, int]:
            return max(largest, ranks[rank].requests + 1), ranks[rank].tokens, rank

        return min(ranks, key=cost)


class PrefixAware:
    """Keep the largest rank's prefill, less what it has cached, and padded decode step low.

    A prefix draws requests only to a rank that has about as many as the others.
    """

    reads_caches = True

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        mean = (sum(each.requests for each in ranks.values()) + 1) / len(ranks)
        most = ceil(mean) + max(1, int(mean) // BALANCE)
        prefill = max(each.pending_prefill for each in ranks.values())
        rows = max(each.requests for each in ranks.values())

        def cost(rank: int) -> tuple[int, int, int, int, int]:
            view = ranks[rank]
            own = view.pending_prefill + demand.prompt_tokens - view.cached_tokens
            largest = max(prefill, own) + max(rows, view.requests + 1)
            return largest, own, view.requests, view.tokens, rank

        return min((rank for rank in ranks if ranks[rank].requests < most), key=cost)


LOAD_BALANCERS: dict[str, type[LoadBalancer]] = {
    "round_robin": RoundRobin,
    "least_tokens": LeastTokens,
    "least_padded_cost": LeastPaddedCost,
    "prefix_aware": PrefixAware,
}
