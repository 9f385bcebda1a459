"""Routing and admission."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.membership import Membership
from dp_runtime.engine.routing.admission import Admission, Place
from dp_runtime.engine.routing.load_balancer import (
    LOAD_BALANCERS,
    Demand,
    LeastPaddedCost,
    LeastTokens,
    RankView,
    RoundRobin,
)
from dp_runtime.engine.routing.queue_moves import RankLimits
from dp_runtime.errors import EngineClosed, EngineOverloaded, PolicyFailed

TEN = Demand(10)
LIMITS = RankLimits(max_num_requests=4, page_size=4, max_moves=2)


def admission_of(dp_size: int, limit: int) -> Admission:
    return Admission(LeastTokens(), Membership.first(dp_size), limit, LIMITS)


def test_round_robin_takes_one_rank_after_the_other() -> None:
    router = RoundRobin()
    queues = [RankView(9, 900), RankView(), RankView()]
    assert [router.choose(dict(enumerate(queues)), TEN) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_tokens_looks_at_tokens_not_requests() -> None:
    assert (
        LeastTokens().choose({0: RankView(1, 500), 1: RankView(3, 100), 2: RankView(2, 101)}, TEN)
        == 1
    )
    assert LeastTokens().choose({0: RankView(), 1: RankView()}, TEN) == 0


def test_least_padded_cost_fills_up_to_the_largest_rank_first() -> None:
    queues = [RankView(3, 10), RankView(2, 900), RankView(3, 20)]
    assert LeastPaddedCost().choose(dict(enumerate(queues)), TEN) == 1
    queues = [RankView(3, 30), RankView(3, 900), RankView(3, 20)]
    assert LeastPaddedCost().choose(dict(enumerate(queues)), TEN) == 2


@given(
    st.sampled_from(sorted(LOAD_BALANCERS)),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5000)), min_size=1, max_size=8),
    st.integers(1, 1000),
)
def test_every_router_names_a_rank(name: str, queues: list[tuple[int, int]], tokens: int) -> None:
    ranks = {3 * at: RankView(*queue) for at, queue in enumerate(queues)}
    assert LOAD_BALANCERS[name]().choose(ranks, Demand(tokens)) in ranks


def test_admission_counts_and_refuses_above_its_limit() -> None:
    admission, first, second = admission_of(2, 2), Demand(10), Demand(5)
    assert admission.enter(first) == 0
    assert admission.enter(second) == 1
    admission.wait(Demand(1))
    for refused in (lambda: admission.enter(Demand(1)), admission.check_place):
        with pytest.raises(EngineOverloaded, match="max_queued_requests") as caught:
            refused()
        assert (caught.value.num_unfinished, caught.value.limit) == (2, 2)
        assert caught.value.num_waiting == 1
    admission.leave(second)
    with pytest.raises(EngineOverloaded):  # the place is that of the one who waited
        admission.enter(Demand(1, dp_rank=0))
    admission.leave(first)
    assert admission.enter(Demand(1, dp_rank=0)) == 0
    assert admission.num_unfinished == 2


def test_those_who_wait_get_places_by_priority_then_in_order_of_arrival() -> None:
    admission = admission_of(1, 1)
    inside = Demand(1)
    admission.enter(inside)
    order = (("a", 1), ("b", 0), ("c", 1), ("d", -1))
    places = {name: admission.wait(Demand(1, priority=turn)) for name, turn in order}
    for name in ("d", "b", "a", "c"):
        assert not places[name].rank.done()
        admission.leave(inside)
        inside = places[name].demand
        assert places[name].rank.result(0) == 0
        assert admission.num_unfinished == 1


def test_who_waits_hears_of_the_end() -> None:
    admission = admission_of(1, 1)
    admission.enter(Demand(1))
    places = [admission.wait(Demand(1)) for _ in range(2)]
    admission.close(EngineClosed("closed"))
    for place in places:
        with pytest.raises(EngineClosed, match="closed"):
            place.rank.result(0)
        admission.give_back(place)
    for refused in (lambda: admission.enter(Demand(1)), lambda: admission.wait(Demand(1))):
        with pytest.raises(EngineClosed):
            refused()
    assert admission.num_unfinished == 1


class Fails(LeastTokens):
    """A policy that has no rank for a request of 13 tokens."""

    def choose(self, ranks: Mapping[int, RankView], demand: Demand) -> int:
        if demand.tokens == 13:
            raise PolicyFailed("thirteen")
        return super().choose(ranks, demand)


def test_a_policy_that_fails_is_told_to_who_waits_and_not_to_who_makes_room() -> None:
    admission = Admission(Fails(), Membership.first(2), 1, LIMITS)
    inside = Demand(1)
    admission.enter(inside)
    bad, good = admission.wait(Demand(13)), admission.wait(Demand(1))
    admission.leave(inside)
    with pytest.raises(PolicyFailed, match="thirteen"):
        bad.rank.result(0)
    admission.give_back(bad)
    assert good.rank.result(0) == 0
    assert admission.num_unfinished == 1


def test_who_finds_no_other_rank_can_still_leave() -> None:
    admission = Admission(Fails(), Membership.first(2), 1, LIMITS)
    pinned = Demand(13, dp_rank=1)
    assert admission.enter(pinned) == 1
    admission.serve(Membership.first(1), gone=(1,))
    with pytest.raises(PolicyFailed):
        admission.again(pinned)
    admission.leave(pinned)
    assert admission.num_unfinished == 0


@given(st.lists(st.tuples(st.sampled_from(["enter", "wait", "leave", "back"]), st.integers(0, 9))))
def test_no_place_is_lost_and_nobody_overtakes(acts: list[tuple[str, int]]) -> None:
    admission, limit = admission_of(2, 3), 3
    inside: list[Demand] = []
    waiting: list[Place] = []
    for act, number in acts:
        match act:
            case "enter" if len(inside) < limit:
                inside.append(Demand(1))
                admission.enter(inside[-1])
            case "enter":
                with pytest.raises(EngineOverloaded):
                    admission.enter(Demand(1))
            case "wait":
                waiting.append(admission.wait(Demand(1, 1, number % 2, number)))
            case "leave" if inside:
                admission.leave(inside.pop(number % len(inside)))
            case "back" if waiting:
                admission.give_back(waiting.pop(number % len(waiting)))
        waiting.sort(key=lambda place: place.turn)
        room = limit - len(inside)
        assert [place.rank.done() for place in waiting] == [n < room for n in range(len(waiting))]
        inside += [place.demand for place in waiting[:room]]
        waiting = waiting[room:] if room > 0 else waiting
        assert admission.num_unfinished == len(inside)


def test_a_place_that_was_given_is_given_back() -> None:
    admission = admission_of(1, 1)
    first = admission.wait(Demand(1))
    second = admission.wait(Demand(1))
    assert first.rank.result(0) == 0
    admission.give_back(first)
    assert second.rank.result(0) == 0
    admission.give_back(second)
    assert admission.num_unfinished == 0
