"""Routing and admission."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.membership import Membership
from dp_runtime.engine.routing.admission import Admission, Place
from dp_runtime.engine.routing.load_balancer import (
    LOAD_BALANCERS,
    LeastPaddedCost,
    LeastTokens,
    RoundRobin,
)
from dp_runtime.engine.routing.load_balancer import Outstanding as Queue
from dp_runtime.errors import EngineClosed, EngineOverloaded


def test_round_robin_takes_one_rank_after_the_other() -> None:
    router = RoundRobin()
    queues = [Queue(9, 900), Queue(), Queue()]
    assert [router.choose(dict(enumerate(queues)), 10) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_least_tokens_looks_at_tokens_not_requests() -> None:
    assert LeastTokens().choose({0: Queue(1, 500), 1: Queue(3, 100), 2: Queue(2, 101)}, 10) == 1
    assert LeastTokens().choose({0: Queue(), 1: Queue()}, 10) == 0


def test_least_padded_cost_fills_up_to_the_largest_rank_first() -> None:
    queues = [Queue(3, 10), Queue(2, 900), Queue(3, 20)]
    assert LeastPaddedCost().choose(dict(enumerate(queues)), 10) == 1
    queues = [Queue(3, 30), Queue(3, 900), Queue(3, 20)]
    assert LeastPaddedCost().choose(dict(enumerate(queues)), 10) == 2


@given(
    st.sampled_from(sorted(LOAD_BALANCERS)),
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5000)), min_size=1, max_size=8),
    st.integers(1, 1000),
)
def test_every_router_names_a_rank(name: str, queues: list[tuple[int, int]], tokens: int) -> None:
    ranks = {3 * at: Queue(*queue) for at, queue in enumerate(queues)}
    assert LOAD_BALANCERS[name]().choose(ranks, tokens) in ranks


def test_admission_counts_and_refuses_above_its_limit() -> None:
    admission = Admission(LeastTokens(), Membership.first(2), 2)
    assert admission.enter(10, None) == 0
    assert admission.enter(5, None) == 1
    admission.wait(1, None)
    for refused in (lambda: admission.enter(1, None), admission.check_place):
        with pytest.raises(EngineOverloaded, match="max_queued_requests") as caught:
            refused()
        assert (caught.value.num_unfinished, caught.value.limit) == (2, 2)
        assert caught.value.num_waiting == 1
    admission.leave(1, 5)
    with pytest.raises(EngineOverloaded):  # the place is that of the one who waited
        admission.enter(1, 0)
    admission.leave(0, 10)
    assert admission.enter(1, 0) == 0
    assert admission.num_unfinished == 2


def test_those_who_wait_get_places_by_priority_then_in_order_of_arrival() -> None:
    admission = Admission(LeastTokens(), Membership.first(1), 1)
    admission.enter(1, None)
    order = (("a", 1), ("b", 0), ("c", 1), ("d", -1))
    places = {name: admission.wait(1, None, priority) for name, priority in order}
    for name in ("d", "b", "a", "c"):
        assert not places[name].rank.done()
        admission.leave(0, 1)
        assert places[name].rank.result(0) == 0
        assert admission.num_unfinished == 1


def test_who_waits_hears_of_the_end() -> None:
    admission = Admission(LeastTokens(), Membership.first(1), 1)
    admission.enter(1, None)
    places = [admission.wait(1, None) for _ in range(2)]
    admission.close(EngineClosed("closed"))
    for place in places:
        with pytest.raises(EngineClosed, match="closed"):
            place.rank.result(0)
        admission.give_back(place)
    for refused in (lambda: admission.enter(1, None), lambda: admission.wait(1, None)):
        with pytest.raises(EngineClosed):
            refused()
    assert admission.num_unfinished == 1


@given(st.lists(st.tuples(st.sampled_from(["enter", "wait", "leave", "back"]), st.integers(0, 9))))
def test_no_place_is_lost_and_nobody_overtakes(acts: list[tuple[str, int]]) -> None:
    admission, limit = Admission(LeastTokens(), Membership.first(2), 3), 3
    inside: list[int] = []
    waiting: list[Place] = []
    for act, number in acts:
        match act:
            case "enter" if len(inside) < limit:
                inside.append(admission.enter(1, None))
            case "enter":
                with pytest.raises(EngineOverloaded):
                    admission.enter(1, None)
            case "wait":
                waiting.append(admission.wait(1, number % 2, number))
            case "leave" if inside:
                admission.leave(inside.pop(number % len(inside)), 1)
            case "back" if waiting:
                admission.give_back(waiting.pop(number % len(waiting)))
        waiting.sort(key=lambda place: place.turn)
        room = limit - len(inside)
        assert [place.rank.done() for place in waiting] == [n < room for n in range(len(waiting))]
        inside += [place.rank.result() for place in waiting[:room]]
        waiting = waiting[room:] if room > 0 else waiting
        assert admission.num_unfinished == len(inside)


def test_a_place_that_was_given_is_given_back() -> None:
    admission = Admission(LeastTokens(), Membership.first(1), 1)
    first = admission.wait(1, None)
    second = admission.wait(1, None)
    assert first.rank.result(0) == 0
    admission.give_back(first)
    assert second.rank.result(0) == 0
    admission.give_back(second)
    assert admission.num_unfinished == 0
