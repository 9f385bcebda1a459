"""Changes of the ranks as the engine makes them, over a group that is only pretended."""

from __future__ import annotations

import threading
from time import sleep
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.membership import Membership
from dp_runtime.engine.routing.admission import Admission
from dp_runtime.engine.routing.load_balancer import Demand, LeastTokens, RoundRobin
from dp_runtime.engine.routing.membership_changes import MembershipChanges
from dp_runtime.engine.routing.queue_moves import RankLimits
from dp_runtime.engine.routing.rank_loads import RankLoads
from dp_runtime.errors import ResizeFailed


class FakeRanks:
    def __init__(self, admission: Admission, size: int) -> None:
        self.members, self._admission = Membership.first(size), admission
        self.refusal: Exception | None = None
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def change(self, target: Membership) -> None:
        self.begun.set()
        assert self.go_on.wait(20)
        if self.refusal is not None:
            raise self.refusal
        self.members = target
        self._admission.serve(target, ())


def changes_of(size: int) -> tuple[MembershipChanges, FakeRanks, Admission]:
    limits = RankLimits(max_num_requests=4, page_size=4, max_moves=2)
    admission = Admission(LeastTokens(), Membership.first(size), 100, limits)
    ranks = FakeRanks(admission, size)
    return MembershipChanges(ranks, admission, lambda: None), ranks, admission


def test_a_rank_that_leaves_gets_nothing_new_and_may_end_what_it_has() -> None:
    changes, ranks, admission = changes_of(2)
    first = Demand(5, dp_rank=1)
    assert admission.enter(first) == 1
    ended: list[Any] = []
    drain = threading.Thread(target=lambda: ended.append(changes.drain(1, 60.0)))
    drain.start()
    while admission.enter(other := Demand(1, dp_rank=1)) == 1:  # it has not begun yet
        admission.leave(other)
        sleep(0.01)
    assert not ranks.begun.is_set()
    admission.leave(first)
    drain.join(20)
    assert ended == [Membership((0,))]
    assert admission.enter(Demand(1, dp_rank=1)) == 0


def test_a_change_that_fails_changes_nothing() -> None:
    changes, ranks, admission = changes_of(2)
    ranks.refusal = ResizeFailed("no room")
    with pytest.raises(ResizeFailed, match="no room"):
        changes.drain(1, 0.0)
    assert admission.enter(Demand(1, dp_rank=1)) == 1


def test_there_is_one_change_at_a_time() -> None:
    changes, ranks, _ = changes_of(2)
    ranks.go_on.clear()
    first = threading.Thread(target=changes.resize, args=(3,))
    first.start()
    assert ranks.begun.wait(20)
    with pytest.raises(ResizeFailed, match="another change of the ranks is under way"):
        changes.resize(1)
    ranks.go_on.set()
    first.join(20)
    assert changes.resize(1) == Membership((0,))


@given(st.data())
def test_no_request_is_counted_where_nobody_serves(data: st.DataObject) -> None:
    loads, placed = RankLoads(RoundRobin(), Membership.first(3), 4), dict[Demand, int]()
    for _ in range(data.draw(st.integers(1, 30))):
        match data.draw(st.sampled_from(["take", "serve", "spare", "settle", "end"])):
            case "take":
                wanted = data.draw(st.none() | st.integers(0, 6))
                demand = Demand(7, dp_rank=wanted)
                placed[demand] = loads.take(demand)
            case "serve":
                names = data.draw(st.sets(st.integers(0, 6), min_size=1))
                loads.serve(Membership(tuple(sorted(names))))
                placed = {demand: loads.settled(demand) for demand in placed}
                assert {*placed.values()} <= names
            case "spare":
                loads.spare(data.draw(st.sets(st.integers(0, 6))))
            case "settle":
                placed = {demand: loads.settled(demand) for demand in placed}
            case "end" if placed:
                loads.give_back(placed.popitem()[0])
        assert loads.num_requests == len(placed)
        for rank in range(7):
            assert loads.num_requests_of({rank}) == sum(one == rank for one in placed.values())
