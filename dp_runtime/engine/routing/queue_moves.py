"""QueueMoves: requests that wait on one rank while another could start them go there."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.engine.routing.load_balancer import Demand
from dp_runtime.engine.routing.rank_loads import RankLoads


@dataclass(frozen=True)
class RankLimits:
    """What a rank can run at once, and how often a request may go to another."""

    max_num_requests: int
    page_size: int
    max_moves: int


@dataclass(frozen=True)
class Move:
    request_id: int
    source: int  # the rank to ask for it


class QueueMoves:
    """Plans moves by what ranks say of their queues; the caller holds a lock."""

    def __init__(self, loads: RankLoads, limits: RankLimits) -> None:
        self._loads, self._limits = loads, limits
        self._reported: dict[int, RankLoad] = {}

    def forget(self, dp_ranks: Collection[int]) -> None:
        for dp_rank in dp_ranks:
            self._reported.pop(dp_rank, None)

    def report(self, dp_rank: int, load: RankLoad) -> list[Move]:
        """Take in how busy a rank is; return the requests that ranks are to be asked for."""
        self._reported[dp_rank] = load
        if not self._limits.max_moves or not any(self._has_room(each) for each in self._targets):
            return []
        sources = [each for each, load in self._reported.items() if load.num_waiting > 0]
        return [move for source in sources for move in self._plan(source)]

    def recalled(self, demand: Demand, given_back: bool) -> int | None:
        """Return the rank that a request which its rank gave back goes to; None if it stays."""
        share = self._loads.share(demand)
        if share is None or share.recalled_from is None:
            return None  # it has ended, or its rank was lost: it goes on elsewhere already
        source, share.recalled_from = share.recalled_from, None
        if not given_back:
            self._loads.redirect(demand, source)
            return None
        return share.dp_rank if share.dp_rank in self._targets else self._loads.again(demand)

    @property
    def _targets(self) -> Collection[int]:
        return self._loads.open_ranks

    def _plan(self, source: int) -> Iterator[Move]:
        """Redirect the first requests that wait on a rank, as long as others could start them."""
        queue = sorted(self._loads.rank(source).unbegun, key=lambda each: each.priority)
        waiting = queue[-self._reported[source].num_waiting :]  # a rank begins them in this order
        for demand in waiting:
            share = self._loads.share(demand)
            assert share is not None, "it is counted on its rank"
            if demand.dp_rank is not None or share.num_moves >= self._limits.max_moves:
                continue
            target = self._target(source, demand)
            if target is None:
                return
            self._loads.redirect(demand, target)
            share.recalled_from, share.num_moves = source, share.num_moves + 1
            load = self._reported[source]
            self._reported[source] = replace(load, num_waiting=load.num_waiting - 1)
            yield Move(demand.request_id, source)

    def _target(self, source: int, demand: Demand) -> int | None:
        """Return the rank that would have a request's first token soonest, if it gains by that."""
        needed = self._pages(demand)
        at_source = self._loads.rank(source).pending_prefill
        found = [
            (self._loads.rank(rank).pending_prefill + self._uncached(rank, demand), rank)
            for rank in self._targets
            if rank != source and self._has_room(rank) and needed <= self._free_pages(rank)
        ]
        load = self._reported[source]
        has_row = load.num_running < self._limits.max_num_requests
        if has_row and needed <= load.free_pages:  # it waits for the prefill of others alone
            found = [(prefill, rank) for prefill, rank in found if prefill < at_source]
        return min(found)[1] if found else None

    def _uncached(self, dp_rank: int, demand: Demand) -> int:
        return demand.prompt_tokens - self._loads.cached_tokens(dp_rank, demand)

    def _has_room(self, dp_rank: int) -> bool:
        load = self._reported.get(dp_rank)
        has_row = self._loads.rank(dp_rank).requests < self._limits.max_num_requests
        return load is not None and not load.num_waiting and has_row

    def _free_pages(self, dp_rank: int) -> int:
        # NOTE: pages of those without a token that are in its steps already count twice.
        given = sum(map(self._pages, self._loads.rank(dp_rank).unbegun))
        return self._reported[dp_rank].free_pages - given

    def _pages(self, demand: Demand) -> int:
        return demand.prompt_tokens // self._limits.page_size + 1
