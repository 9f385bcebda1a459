"""Shared pages: every row reads its own tokens' pages, and hits are those of a plain model."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.batch import NULL_PAGE
from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.prefix_cache.prefix_cache import PrefixCache
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.abandonment import abandon_steps
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from tests.dp_runtime.reference_prefixes import Prefix, ReferencePrefixes
from tests.dp_runtime.reference_scheduler import ReferenceScheduler, Rows
from tests.dp_runtime.scheduler.test_scheduler import (
    MODEL_LEN,
    PROGRAM,
    STOP_TOKEN,
    Driver,
)

PAGE, BROUGHT = 4, np.zeros((1, 1, 1), np.int16)
Content = tuple[Hashable, tuple[int, ...]]  # salt, and all tokens up to a slot's own


class SharingDriver(Driver):
    """A device whose slots remember all that their content depends on, and a model of the cache.

    What leaves the cache is poisoned, and what is in it must stay what it was.
    """

    def __init__(
        self,
        num_pages: int,
        tokens: int = 16,
        depth: int = 0,
        hasher: PageHasher | None = None,
        min_awaited_tokens: int = PAGE,
        max_drafts: int = 0,
    ) -> None:
        own, self.covers_next = min_awaited_tokens, max_drafts > 0
        limits = Limits(6, tokens, MODEL_LEN, max_drafts, min_awaited_tokens=own)
        named = hasher or PageHasher(PAGE, "a model", self.covers_next)
        super().__init__(Scheduler(PageGeometry(num_pages, PAGE), limits, (), named), depth)
        self.model = ReferencePrefixes(PAGE, self.known, self.covers_next)
        self.reference = ReferenceScheduler(self.scheduler.pages, limits, self.model)
        self.slots: dict[int, Content] = {}
        self.was_cached: set[int] = set()
        self.scored: dict[int, int] = {}

    @property
    def cache(self) -> PrefixCache:
        return self.scheduler.page_table.allocator.cache

    def known(self, number: int) -> tuple[Hashable, tuple[int, ...], int]:
        item = self.requests[number]
        brings = item.replay is not None  # and so has no page that others could have
        tokens = () if brings else (*item.prompt_token_ids, *self.outputs[number])
        scored = self.scored.get(number, 0)
        scores = item.params.prompt_logprobs is not None and scored < len(item.prompt_token_ids) - 1
        return item.params.cache_salt, tokens, scored if scores else MODEL_LEN

    def content(self, number: int, position: int) -> Content:
        tokens = tuple(self.token_at(number, at) for at in range(position + 1 + self.covers_next))
        return self.requests[number].params.cache_salt, tokens

    def check_batch(self, scheduled: SchedulerOutput, rows: Rows) -> None:
        super().check_batch(scheduled, rows)
        self.poison()
        batch = scheduled.target
        for (number, start, end), pages in zip(rows, batch.page_table.tolist(), strict=True):
            for at in range(start, end):
                self.slots[pages[at // PAGE] * PAGE + at % PAGE] = self.content(number, at)
        for (number, _, end), pages in zip(rows, batch.page_table.tolist(), strict=True):
            for at in range(end):
                found = self.slots[pages[at // PAGE] * PAGE + at % PAGE]
                assert found == self.content(number, at), f"{number} reads another's token at {at}"
        for chunk in scheduled.scored:
            self.scored[chunk.state.request_id] = chunk.score_end

    def poison(self) -> None:
        """Spoil what has left the cache since the last check."""
        for page in self.was_cached - self.cached_pages():
            self.slots |= dict.fromkeys(range(page * PAGE, page * PAGE + PAGE), ("poison", ()))

    def cached_pages(self) -> set[int]:
        return {page for page in range(self.scheduler.pages.num_pages) if page in self.cache}

    def check(self) -> None:
        super().check()
        prefixes, allocator = self.scheduler.prefixes, self.scheduler.page_table.allocator
        assert prefixes is not None
        self.was_cached = self.cached_pages()
        assert {self.prefix_of(page) for page in self.was_cached} == self.model.cached
        counts = prefixes.num_queries, prefixes.num_hits, allocator.num_evictions
        model = self.model
        assert counts == (model.num_queries, model.num_hits, model.num_evictions)

    def prefix_of(self, page: int) -> Prefix:
        """The tokens of a cached page and of those before it, which its slots must have."""
        salt, tokens = self.slots[page * PAGE + PAGE - 1]
        for at in range(PAGE):
            assert self.slots[page * PAGE + at] == (salt, tokens[: len(tokens) - PAGE + 1 + at])
        return salt, tokens

    def abandon(self) -> None:
        """End an epoch: launched steps have run, but nobody hears of them."""
        self.in_flight.clear()
        table = self.scheduler.table
        rows = table.request_ids[table.req_indices].tolist()
        abandon_steps(self.scheduler)
        for number in self.requests:
            if (state := self.scheduler.requests.get(number)) is not None:
                self.scored[number] = state.num_scored
        known = {
            number: len(item.prompt_token_ids) + len(self.outputs[number])
            for number, item in self.requests.items()
        }
        self.reference.abandon_plain(known, rows)
        self.check()


def prompt_of(family: int, length: int) -> tuple[int, ...]:
    """Families have their first six tokens in common."""
    return tuple(100 + at if at < 6 else 200 + 50 * family + at for at in range(length))


def request(number: int, prompt: tuple[int, ...], outputs: int, **changes: Any) -> RankRequest:
    params = SamplingParams(max_tokens=outputs, **changes)
    return RankRequest(number, prompt, params, 0, frozenset({STOP_TOKEN}))


def drawn(number: int, prompt: tuple[int, ...], outputs: int, priority: int = 0) -> RankRequest:
    salt, scores = "mine" if number % 5 == 4 else None, 1 if number % 4 == 3 else None
    params = {"cache_salt": salt, "prompt_logprobs": scores, "priority": priority}
    replay = BROUGHT if number % 7 == 6 else None
    return replace(request(number, prompt, outputs, **params), replay=replay)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 30), st.integers(1, 20)),
        st.tuples(st.just("follow"), st.integers(0, 20), st.integers(0, 6), st.integers(1, 9)),
        st.tuples(st.just("step"), st.none() | st.integers(1, 20), st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.none(), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0), st.just(0)),
        st.tuples(st.just("abandon"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(
    actions, st.integers(11, 40), st.integers(1, 40), st.integers(0, 1), st.sampled_from([1, 7, 99])
)
def test_pages_are_shared_as_a_plain_model_says(
    todo: list[tuple[str, Any, int, int]], num_pages: int, tokens: int, depth: int, awaited: int
) -> None:
    driver = SharingDriver(num_pages, tokens, depth, min_awaited_tokens=awaited)
    play(driver, todo)
    driver.drain()
    assert driver.scheduler.num_free_pages == num_pages - 1
    driver.check_outputs()


def play(driver: SharingDriver, todo: list[tuple[str, Any, int, int]]) -> None:
    for name, first, second, outputs in todo:
        number = len(driver.requests)
        if name == "add":
            driver.add(drawn(number, prompt_of(first, second), outputs, second % 3))
        elif name == "follow" and first < number:
            before = driver.requests[first].prompt_token_ids, driver.outputs[first]
            prompt = (*before[0], *before[1], *range(300, 300 + second))[: MODEL_LEN - 1]
            driver.add(drawn(number, prompt, outputs))
        elif name == "abort" and first < number:
            driver.abort(first)
        elif name == "step":
            driver.step(prefill_budget=first)
        elif name == "abandon":
            driver.abandon()


class CollidingHasher(PageHasher):
    """Has two digests for all pages."""

    def link(self, parent: bytes, content: bytes, embeds: bytes) -> bytes:
        return bytes([super().link(parent, content, embeds)[0] % 2])


@settings(deadline=None, max_examples=60)
@given(actions, st.integers(11, 40), st.integers(0, 1))
def test_a_page_is_not_served_to_who_has_its_digest_by_chance(
    todo: list[tuple[str, Any, int, int]], num_pages: int, depth: int
) -> None:
    class CollidingDriver(SharingDriver):
        def check(self) -> None:
            self.scheduler.check()
            self.was_cached = self.cached_pages()

        def due_rows(self, scheduled: SchedulerOutput, prefill_budget: int | None) -> Rows:
            numbers = self.scheduler.table.request_ids[scheduled.req_indices].tolist()
            ends = scheduled.target.seq_lens.tolist()
            starts = (scheduled.target.seq_lens - scheduled.target.query_lens).tolist()
            return list(zip(numbers, starts, ends, strict=True))

    driver = CollidingDriver(num_pages, 16, depth, CollidingHasher(PAGE, "a model"))
    driver.reference = _Nobody()  # type: ignore[assignment]
    play(driver, todo)
    driver.drain()
    driver.check_outputs()


class _Nobody:
    """No model: who is refused a page by a collision is hard to say."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def run(driver: SharingDriver, *requests: RankRequest) -> list[int]:
    """Serve requests one after the other; returns how many tokens each found."""
    found = []
    for item in requests:
        assert driver.scheduler.prefixes is not None
        before = driver.scheduler.prefixes.num_hits
        driver.add(item)
        driver.drain()
        found.append(driver.scheduler.prefixes.num_hits - before)
    return found


@pytest.mark.parametrize("depth", [0, 1])
def test_the_next_turn_of_a_chat_finds_prompt_and_outputs(depth: int) -> None:
    driver = SharingDriver(40, depth=depth)
    prompt = prompt_of(0, 9)
    run(driver, request(2, prompt, 8))
    outputs = tuple(driver.outputs[2])
    assert len(outputs) == 8
    again = run(driver, request(3, (*prompt, *outputs, 300, 301), 3))
    assert again == [16], "all but the last token of the first turn was computed"


def test_a_whole_prompt_that_is_cached_is_computed_from_its_last_page_on() -> None:
    driver = SharingDriver(40)
    prompt = prompt_of(0, 12)
    assert run(driver, *(request(number, prompt, 2) for number in (0, 1))) == [0, 8]
    (update_of_last,) = [driver.scheduler.prefixes]
    assert update_of_last is not None
    assert (update_of_last.num_queries, update_of_last.num_hits) == (24, 8)


def test_who_is_aborted_tells_what_it_found() -> None:
    driver = SharingDriver(40)
    prompt = prompt_of(0, 12)
    run(driver, request(0, prompt, 2))
    for number, steps in ((1, 1), (2, 0)):
        driver.add(request(number, prompt, 8))
        for _ in range(steps):
            driver.step()
        update = driver.scheduler.abort(number)
        assert update is not None
        assert (update.num_cached_tokens, update.first_index) == (8 * steps, steps)


def test_other_salts_and_other_beginnings_find_nothing() -> None:
    driver = SharingDriver(40)
    prompt = prompt_of(0, 12)
    salted = [request(number, prompt, 2, cache_salt=salt) for number, salt in enumerate("aba")]
    assert run(driver, *salted) == [0, 0, 8]
    assert run(driver, request(5, (0, *prompt[1:]), 2), request(6, prompt, 2)) == [0, 0]


def test_prompt_logprobs_are_computed_and_those_who_ask_leave_their_pages() -> None:
    driver = SharingDriver(40)
    prompt = prompt_of(0, 12)
    scoring = [request(number, prompt, 2, prompt_logprobs=1) for number in (0, 1)]
    assert run(driver, *scoring, request(2, prompt, 2)) == [0, 0, 8]


def test_who_brings_experts_neither_finds_nor_leaves_pages() -> None:
    driver = SharingDriver(40)
    usual = [request(number, prompt_of(0, 12), 2) for number in range(4)]
    brings = [replace(one, replay=BROUGHT) for one in usual]
    assert run(driver, brings[0], usual[1], brings[2], usual[3]) == [0, 0, 0, 8]


def test_a_preempted_request_finds_its_own_pages() -> None:
    driver = SharingDriver(12)
    for number in range(100, 106):
        driver.add(request(number, (number, *prompt_of(0, 7)), 30))
    again = []
    while driver.scheduler.has_work:
        step = driver.step()
        again += [chunk.start for chunk in step.chunks if chunk.state.outputs]
    assert driver.scheduler.num_preemptions > 0
    assert max(again) > 0, "it began where its pages end"


def test_a_request_whose_logits_were_not_finite_leaves_nothing() -> None:
    driver = SharingDriver(40)
    driver.add(request(1, prompt_of(0, 12), 9))
    scheduled = driver.scheduler.schedule(PROGRAM)
    (update,) = driver.scheduler.commit(scheduled, SampledTokens((0,), (None,), invalid={0: ""}))
    assert update.error
    pages = set(scheduled.target.page_table.flatten().tolist()) - {NULL_PAGE}
    assert set(driver.scheduler.page_table.take_pages_to_clear()) == pages
    assert len(driver.cache) == 0


def test_pages_from_before_logits_that_were_not_finite_stay_and_are_not_cleared() -> None:
    driver = SharingDriver(40)
    driver.add(request(1, prompt_of(0, 9), 9))
    driver.step()
    scheduled = driver.scheduler.schedule(PROGRAM)
    driver.scheduler.commit(scheduled, SampledTokens((0,), (None,), invalid={0: ""}))
    cached, own = scheduled.target.page_table[0, :2].tolist(), scheduled.target.page_table[0, 2:]
    assert driver.scheduler.page_table.take_pages_to_clear() == own.tolist()
    assert driver.cached_pages() == set(cached)
