"""Routing by what each rank has cached and has to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.membership import Membership
from dp_runtime.core.rank_events.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from dp_runtime.core.rank_events.rank_load import RankLoad
from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.routing.admission import Admission
from dp_runtime.engine.routing.load_balancer import BALANCE, Demand, PrefixAware, RankView
from dp_runtime.engine.routing.queue_moves import Move, RankLimits
from dp_runtime.engine.routing.rank_caches import RankCaches, prompt_pages
from dp_runtime.prefix_cache.page_hash import PageHasher

PAGE = 4
PROMPT = Demand(tokens=200, prompt_tokens=100)


def admission_of(dp_size: int) -> Admission:
    limits = RankLimits(max_num_requests=64, page_size=PAGE, max_moves=2)
    return Admission(PrefixAware(), Membership.first(dp_size), 10_000, limits)


def prompt(*names: str, more: int = 1) -> Demand:
    """Full pages of these names and some tokens more."""
    tokens = PAGE * len(names) + more
    return Demand(2 * tokens, tokens, digests=[name.encode() for name in names])


def stored(*names: str) -> list[BlockStored]:
    return [BlockStored((name.encode(),), None, (0,) * PAGE, PAGE) for name in names]


def test_the_largest_prefill_decides_and_what_is_cached_is_none() -> None:
    choose = PrefixAware().choose
    assert choose({0: RankView(), 1: RankView(cached_tokens=96)}, PROMPT) == 1
    busy = RankView(1, 100, pending_prefill=500, cached_tokens=96)
    assert choose({0: RankView(1, 100), 1: busy}, PROMPT) == 0
    less = RankView(1, 100, pending_prefill=90, cached_tokens=96)
    assert choose({0: RankView(1, 100), 1: less}, PROMPT) == 1
    # Another's prefill is larger in any case: the least of their own.
    views = {0: RankView(1, 9, 5000), 1: RankView(1, 9, 50), 2: RankView(1, 9, 0)}
    assert choose(views, PROMPT) == 2


def test_among_equal_prefills_the_padded_step_decides_then_tokens() -> None:
    choose = PrefixAware().choose
    assert choose({0: RankView(3, 10), 1: RankView(2, 900), 2: RankView(3, 20)}, PROMPT) == 1
    assert choose({0: RankView(3, 30), 1: RankView(3, 900), 2: RankView(3, 20)}, PROMPT) == 2


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 5000), st.integers(0, 5000),
                          st.integers(0, 99)), min_size=1, max_size=8))  # fmt: skip
def test_no_cache_draws_a_request_to_a_rank_with_many_more(
    views: list[tuple[int, int, int, int]],
) -> None:
    ranks = {2 * at: RankView(*view) for at, view in enumerate(views)}
    chosen = PrefixAware().choose(ranks, PROMPT)
    assert chosen == PrefixAware().choose(ranks, PROMPT)
    mean = (sum(view.requests for view in ranks.values()) + 1) / len(ranks)
    assert ranks[chosen].requests + 1 <= mean + 1 + max(1, mean / BALANCE)


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("is_cached", [False, True])
def test_a_group_of_alike_prompts_is_spread(dp_size: int, is_cached: bool) -> None:
    admission, names = admission_of(dp_size), [f"page {number}" for number in range(50)]
    if is_cached:
        admission.cached(dp_size - 1, stored(*names))
    ranks = Counter(admission.enter(prompt(*names)) for _ in range(16))
    mean = 16 / dp_size
    assert max(ranks.values()) <= np.ceil(mean) + 1
    assert min(ranks[rank] for rank in range(dp_size)) >= np.floor(mean) - 2


def test_a_conversation_stays_where_it_is_cached_while_its_rank_has_no_more_to_do() -> None:
    admission, names = admission_of(2), [str(number) for number in range(20)]
    other = prompt("other")
    assert admission.enter(other) == 0
    first = prompt(*names[:10])
    assert admission.enter(first) == 1
    admission.cached(1, stored(*names[:10]))
    admission.leave(first)
    second = prompt(*names)
    assert admission.enter(second) == 1
    admission.leave(second)
    admission.cached(1, [BlockRemoved((b"5",))])  # what follows a page that is gone is no prefix
    assert admission._loads.cached_tokens(1, second) == 5 * PAGE
    admission.cached(1, [AllBlocksCleared()])
    assert admission._loads.cached_tokens(1, second) == 0


def test_prompts_that_come_together_count_as_cached_where_they_went() -> None:
    admission, names = admission_of(4), [str(number) for number in range(10)]
    long = [prompt(f"long {number}", more=30) for number in range(4)]
    assert [admission.enter(each) for each in long] == [0, 1, 2, 3]
    first = prompt(*names)
    rank = admission.enter(first)
    assert admission._loads.cached_tokens(rank, prompt(*names, "own")) == 10 * PAGE
    admission.begun([_Begun(first)])  # from now on events tell what is there
    assert admission._loads.cached_tokens(rank, prompt(*names, "own")) == 0


class _Begun:
    def __init__(self, demand: Demand) -> None:
        self.demand, self.num_cached_tokens = demand, 0


def test_a_lost_ranks_cache_is_forgotten() -> None:
    admission, names = admission_of(2), ["a", "b", "c"]
    admission.cached(1, stored(*names))
    admission.serve(Membership.first(2), {1})
    assert admission._loads.cached_tokens(1, prompt(*names)) == 0
    assert admission.enter(prompt(*names)) == 0


def test_the_last_token_is_always_computed() -> None:
    names, tokens = PageHasher(PAGE, "model"), tuple(range(2 * PAGE))
    request = RankRequest(0, tokens, SamplingParams(max_tokens=1), 0, frozenset())
    digests = names.digests(np.array(tokens))
    admission, whole = admission_of(1), Demand.of(request, None, prompt_pages(request, names))
    admission.cached(0, [BlockStored((each,), None, (0,) * PAGE, PAGE) for each in digests])
    assert admission._loads.cached_tokens(0, whole) == PAGE, "and its page with it"


def test_a_move_counts_what_the_other_has_cached() -> None:
    admission, names = admission_of(2), [str(number) for number in range(20)]
    pinned = Demand(300, 120, dp_rank=0)
    for each in (pinned, Demand(200, 100, dp_rank=1)):
        admission.enter(each)
    waits = Demand(200, 81, request_id=7, digests=[name.encode() for name in names])
    admission._loads.take(waits)
    admission._loads.redirect(waits, 0)
    admission.report(0, RankLoad(1, 1, 1000))
    idle = RankLoad(1, 0, 1000)
    admission.cached(1, stored(*names))
    assert admission.report(1, idle) == [Move(7, 0)]


@given(st.data())
def test_pages_count_while_they_are_there_or_coming(data: st.DataObject) -> None:
    caches, there = RankCaches(), set[bytes]()
    coming = list[tuple[bytes, ...]]()
    for _ in range(data.draw(st.integers(1, 30))):
        page = data.draw(st.sampled_from([b"a", b"b", b"c"]))
        match data.draw(st.sampled_from(["store", "remove", "clear", "expect", "arrive"])):
            case "store":
                caches.apply(0, [BlockStored((page,), None, (1,), 1)])
                there.add(page)
            case "remove":
                caches.apply(0, [BlockRemoved((page,))])
                there.discard(page)
            case "clear":
                caches.forget([0])
                there.clear()
            case "expect":
                coming.append(tuple(data.draw(st.lists(st.sampled_from([b"a", b"b", b"c"])))))
                caches.expect(0, coming[-1])
            case "arrive" if coming:
                caches.arrived(0, coming.pop())
        known = there | {page for pages in coming for page in pages}
        asked = data.draw(st.lists(st.sampled_from([b"a", b"b", b"c"])))
        missing = [at for at, page in enumerate(asked) if page not in known]
        assert caches.num_pages(0, asked) == (missing[0] if missing else len(asked))
        assert caches.num_pages(1, asked) == 0


def test_prompts_are_named_as_ranks_name_them() -> None:
    names, tokens = PageHasher(PAGE, "model"), tuple(range(11))
    request = RankRequest(0, tokens, SamplingParams(max_tokens=1), 0, frozenset())
    assert prompt_pages(request, names) == names.digests(np.array(tokens))
    told = (SamplingParams(prompt_logprobs=1), SamplingParams(return_routed_experts=True))
    computed = [replace(request, params=params) for params in told]
    computed.append(replace(request, replay=np.zeros((1, 1, 1), np.int16)))
    assert [prompt_pages(each, names) for each in computed] == [(), (), ()]
