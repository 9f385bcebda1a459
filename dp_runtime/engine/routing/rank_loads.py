"""RankLoads: what each rank has to do, and which ranks are given more."""

from __future__ import annotations

from collections.abc import Collection

from dp_runtime.core.membership import Membership
from dp_runtime.engine.routing.load_balancer import LoadBalancer, Outstanding


class RankLoads:
    """Counts the unfinished requests of each rank; the caller holds a lock."""

    def __init__(self, balancer: LoadBalancer, members: Membership) -> None:
        self._balancer, self._members = balancer, members
        self._ranks = {rank: Outstanding() for rank in members.dp_ranks}
        self._leaving: frozenset[int] = frozenset()

    @property
    def num_requests(self) -> int:
        return sum(rank.requests for rank in self._ranks.values())

    def num_requests_of(self, dp_ranks: Collection[int]) -> int:
        return sum(rank.requests for name, rank in self._ranks.items() if name in dp_ranks)

    def serve(self, members: Membership) -> None:
        """Choose among these ranks from now on."""
        for dp_rank in members.dp_ranks:
            self._ranks.setdefault(dp_rank, Outstanding())
        self._members = members

    def spare(self, dp_ranks: Collection[int]) -> None:
        """Give these ranks nothing more as long as there are others."""
        self._leaving = frozenset(dp_ranks)

    def take(self, tokens: int, dp_rank: int | None = None) -> int:
        """Return the rank of a request, which is `dp_rank` where that is given and serves."""
        known = [rank for rank in self._members.dp_ranks if rank not in self._leaving]
        ranks = known or list(self._members.dp_ranks)
        if dp_rank not in ranks:
            dp_rank = self._balancer.choose({rank: self._ranks[rank] for rank in ranks}, tokens)
        assert dp_rank is not None, "chosen above"
        self._ranks[dp_rank].requests += 1
        self._ranks[dp_rank].tokens += tokens
        return dp_rank

    def give_back(self, dp_rank: int, tokens: int) -> None:
        self._ranks[dp_rank].requests -= 1
        self._ranks[dp_rank].tokens -= tokens

    def settled(self, dp_rank: int, tokens: int) -> int:
        """Return the rank of a request that was given one: another if that has left since."""
        if dp_rank in self._members:
            return dp_rank
        self.give_back(dp_rank, tokens)
        return self.take(tokens)
