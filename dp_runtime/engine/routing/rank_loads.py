"""RankLoads: what each rank has to do, and which ranks are given more."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from dp_runtime.core.membership import Membership
from dp_runtime.engine.routing.load_balancer import Demand, LoadBalancer, RankView
from dp_runtime.engine.routing.rank_caches import RankCaches
from dp_runtime.errors import PolicyFailed


@dataclass
class Outstanding:
    requests: int = 0
    tokens: int = 0
    pending_prefill: int = 0
    unbegun: dict[Demand, None] = field(default_factory=dict)  # without a token, as they came


@dataclass
class Share:
    """A request on its rank, or on its way to it."""

    dp_rank: int
    cached_tokens: int  # that the rank is expected to find
    begun: bool = False  # has a token of this rank
    recalled_from: int | None = None  # the rank that is asked to give it back
    num_moves: int = 0


class RankLoads:
    """Counts the unfinished requests of each rank; the caller holds a lock."""

    def __init__(
        self,
        balancer: LoadBalancer,
        members: Membership,
        page_size: int,
        caches: RankCaches | None = None,
    ) -> None:
        self._balancer, self._members, self._page_size = balancer, members, page_size
        self._ranks = {rank: Outstanding() for rank in members.dp_ranks}
        self._shares: dict[Demand, Share] = {}
        self._leaving: frozenset[int] = frozenset()
        self.caches = caches or RankCaches()

    @property
    def num_requests(self) -> int:
        return len(self._shares)

    @property
    def open_ranks(self) -> Sequence[int]:
        known = [rank for rank in self._members.dp_ranks if rank not in self._leaving]
        return known or self._members.dp_ranks

    def num_requests_of(self, dp_ranks: Collection[int]) -> int:
        return sum(rank.requests for name, rank in self._ranks.items() if name in dp_ranks)

    def rank(self, dp_rank: int) -> Outstanding:
        return self._ranks[dp_rank]

    def share(self, demand: Demand) -> Share | None:
        return self._shares.get(demand)

    def serve(self, members: Membership) -> None:
        for dp_rank in members.dp_ranks:
            self._ranks.setdefault(dp_rank, Outstanding())
        self._members = members

    def spare(self, dp_ranks: Collection[int]) -> None:
        """Give these ranks nothing more as long as there are others."""
        self._leaving = frozenset(dp_ranks)

    def take(self, demand: Demand) -> int:
        """Return the rank of a request, which is the one it is pinned to where that serves."""
        ranks, dp_rank = self.open_ranks, demand.dp_rank
        if dp_rank not in ranks:
            views = {rank: self.view(rank, demand) for rank in ranks}
            dp_rank = self._balancer.choose(views, demand)
        assert dp_rank is not None, "chosen above"
        share = self._shares[demand] = Share(dp_rank, self.cached_tokens(dp_rank, demand))
        self._count_in(demand, share)
        return dp_rank

    def begun(self, demand: Demand) -> int:
        """Hear of a request's first token; return what its rank was expected to have cached."""
        share = self._shares.get(demand)
        if share is None or share.begun:
            return 0
        self._count_out(demand, share)
        share.begun = True
        self._count_in(demand, share)
        return share.cached_tokens

    def give_back(self, demand: Demand) -> None:
        self._count_out(demand, self._shares.pop(demand))

    def settled(self, demand: Demand) -> int:
        """Return the rank of a request that was given one: another if that has left since."""
        dp_rank = self._shares[demand].dp_rank
        return dp_rank if dp_rank in self._members else self.again(demand)

    def again(self, demand: Demand) -> int:
        before = self._shares[demand]
        self.give_back(demand)
        try:
            dp_rank = self.take(demand)
        except PolicyFailed:  # it has entered as before, and can still leave
            self._shares[demand] = before
            self._count_in(demand, before)
            raise
        self._shares[demand].num_moves = before.num_moves
        return dp_rank

    def redirect(self, demand: Demand, dp_rank: int) -> None:
        share = self._shares[demand]
        self._count_out(demand, share)
        share.dp_rank, share.cached_tokens = dp_rank, self.cached_tokens(dp_rank, demand)
        self._count_in(demand, share)

    def view(self, dp_rank: int, demand: Demand) -> RankView:
        rank, cached = self._ranks[dp_rank], self.cached_tokens(dp_rank, demand)
        return RankView(rank.requests, rank.tokens, rank.pending_prefill, cached)

    def cached_tokens(self, dp_rank: int, demand: Demand) -> int:
        """Count prompt tokens that a rank need not compute."""
        return self.caches.num_pages(dp_rank, demand.digests) * self._page_size

    def _count_in(self, demand: Demand, share: Share) -> None:
        rank = self._ranks[share.dp_rank]
        rank.requests += 1
        rank.tokens += demand.tokens
        if not share.begun:
            rank.pending_prefill += demand.prompt_tokens - share.cached_tokens
            rank.unbegun[demand] = None
            self.caches.expect(share.dp_rank, demand.digests)

    def _count_out(self, demand: Demand, share: Share) -> None:
        rank = self._ranks[share.dp_rank]
        rank.requests -= 1
        rank.tokens -= demand.tokens
        if not share.begun:
            rank.pending_prefill -= demand.prompt_tokens - share.cached_tokens
            del rank.unbegun[demand]
            self.caches.arrived(share.dp_rank, demand.digests)
