"""Admission of requests: each gets a rank, and so many may be unfinished."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from dp_runtime.core.membership import Membership
from dp_runtime.core.rank_events.kv_events import KvEvent
from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.engine.routing.load_balancer import Demand, LoadBalancer
from dp_runtime.engine.routing.queue_moves import Move, QueueMoves, RankLimits
from dp_runtime.engine.routing.rank_caches import RankCaches
from dp_runtime.engine.routing.rank_loads import RankLoads
from dp_runtime.errors import EngineOverloaded, PolicyFailed, fresh


@dataclass(frozen=True, eq=False)
class Place:
    """What a caller waits for; `rank` is known once there is room for its request."""

    demand: Demand
    turn: tuple[int, int]  # priority and arrival, the lowest comes first
    rank: Future[int]


class Begun(Protocol):
    demand: Demand
    num_cached_tokens: int


class Admission:
    """Gives new requests to ranks, and bounds how many are unfinished.

    Whoever leaves hands the place to the first who waits: nobody who comes later can take it.
    """

    def __init__(
        self,
        balancer: LoadBalancer,
        members: Membership,
        limit: int,
        ranks: RankLimits,
        caches: RankCaches | None = None,
    ) -> None:
        self._loads = RankLoads(balancer, members, ranks.page_size, caches)
        self._moves = QueueMoves(self._loads, ranks)
        self._limit = limit
        self._lock = threading.RLock()  # a place may be given back by the collection of garbage
        self._waiting: list[Place] = []  # by turn
        self._arrivals = count()
        self._closed: BaseException | None = None

    @property
    def num_unfinished(self) -> int:
        return self._loads.num_requests

    def check_place(self) -> None:
        """Raise EngineOverloaded where `enter` would."""
        with self._lock:
            if self._full and not self._closed:
                raise EngineOverloaded(self.num_unfinished, self._limit, len(self._waiting))

    def enter(self, demand: Demand) -> int:
        """Return the rank of a new request, or raise EngineOverloaded."""
        with self._lock:
            self.check_place()
            self._check_open()
            return self._loads.take(demand)

    def wait(self, demand: Demand) -> Place:
        """Return the place of a new request, which has its rank as soon as it is this one's turn.

        Whoever does not use it gives it back.
        """
        rank: Future[int] = Future()
        rank.set_running_or_notify_cancel()  # it is given back, never cancelled
        with self._lock:
            self._check_open()
            place = Place(demand, (demand.priority, next(self._arrivals)), rank)
            insort(self._waiting, place, key=lambda waiting: waiting.turn)
            self._hand_out()
        return place

    def take(self, place: Place) -> int:
        """Return the rank of a place; above the limit if it is not yet this one's turn."""
        with self._lock:
            if place in self._waiting:
                self._waiting.remove(place)
                self._settle(place)
        return place.rank.result()

    def give_back(self, place: Place) -> None:
        """Take back a place, whether the caller still waits for it or has got it."""
        with self._lock:
            if place in self._waiting:
                self._waiting.remove(place)
            elif place.rank.exception() is None:
                self.leave(place.demand)

    def again(self, demand: Demand) -> int:
        """Return the rank where a request that was on a lost one begins again."""
        with self._lock:
            return self._loads.again(demand)

    def begun(self, requests: Sequence[Begun]) -> tuple[int, int]:
        """Hear of first tokens; return the prompts' tokens expected in a cache, and found there."""
        with self._lock:
            expected = sum(self._loads.begun(each.demand) for each in requests)
        return expected, sum(each.num_cached_tokens for each in requests)

    def leave(self, demand: Demand) -> None:
        with self._lock:
            self._loads.give_back(demand)
            self._hand_out()

    def settled(self, demand: Demand) -> int:
        """Return the rank of a request that has entered: another if that has left since."""
        with self._lock:
            return self._loads.settled(demand)

    def report(self, dp_rank: int, load: RankLoad) -> list[Move]:
        """Hear how busy a rank is; return requests that ranks are to give back, for others."""
        with self._lock:
            return self._moves.report(dp_rank, load)

    def recalled(self, demand: Demand, given_back: bool) -> int | None:
        """Return the rank that a request which was given back goes to; None if it stays."""
        with self._lock:
            return self._moves.recalled(demand, given_back)

    def cached(self, dp_rank: int, events: Sequence[KvEvent]) -> None:
        with self._lock:
            self._loads.caches.apply(dp_rank, events)

    def serve(self, members: Membership, gone: Collection[int]) -> None:
        """Choose among these from now on; who had the place of one that is `gone` is forgotten."""
        with self._lock:
            self._loads.serve(members)
            self._loads.caches.forget(gone)
            self._moves.forget(gone)

    def spare(self, dp_ranks: Collection[int]) -> None:
        """Give these ranks nothing more as long as there are others."""
        with self._lock:
            self._loads.spare(dp_ranks)

    def num_unfinished_of(self, dp_ranks: Collection[int]) -> int:
        with self._lock:
            return self._loads.num_requests_of(dp_ranks)

    def close(self, error: BaseException) -> None:
        """Refuse everyone from now on, even those that wait."""
        with self._lock:
            self._closed = error
            waiting, self._waiting = self._waiting, []
        for place in waiting:
            place.rank.set_exception(fresh(error))

    @property
    def _full(self) -> bool:
        return self.num_unfinished >= self._limit

    def _check_open(self) -> None:
        if self._closed:
            raise fresh(self._closed)

    def _hand_out(self) -> None:
        while self._waiting and not self._full:
            self._settle(self._waiting.pop(0))

    def _settle(self, place: Place) -> None:
        try:
            place.rank.set_result(self._loads.take(place.demand))
        except PolicyFailed as error:  # who waits hears of it, not who has made room
            place.rank.set_exception(error)
