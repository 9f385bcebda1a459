"""The scheduler under random arrivals, aborts and page shortage, at depth 0 and 1."""

from collections import Counter, deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place, check_values
from dp_runtime.core.batch import (
    ALL_EXACT,
    AS_POSITIONS,
    NO_EMBEDS,
    NO_IMAGES,
    NO_REPLAYS,
    NO_STATES,
)
from dp_runtime.core.request import FinishReason, RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import SERVING_PROGRAMS
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.request_state import RequestStatus
from dp_runtime.scheduler.routed_rows import NO_ROUTED_ROWS
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import NO_MOVES, SchedulerOutput
from tests.dp_runtime.reference_scheduler import ReferenceScheduler, Rows
from tests.dp_runtime.scheduler.routed_positions import RoutedPositions

PROGRAM = SERVING_PROGRAMS[0]
MODEL_LEN = 40
STOP_TOKEN = 7


def request(number: int, prompt: int, outputs: int, priority: int = 0) -> RankRequest:
    routed = number % 2 == 1
    params = SamplingParams(max_tokens=outputs, priority=priority, return_routed_experts=routed)
    return RankRequest(number, tuple(range(1, prompt + 1)), params, 0, frozenset({STOP_TOKEN}))


def token_of(request_id: int, output_index: int) -> int:
    """The model of these tests: token STOP_TOKEN comes up now and then."""
    return (request_id * 31 + output_index * 17) % 50


class Driver:
    """Plays a step loop without a model: launches, holds steps back, commits.

    Every step is compared with what the reference chooses.
    """

    def __init__(self, scheduler: Scheduler, depth: int) -> None:
        self.scheduler = scheduler
        self.reference = ReferenceScheduler(scheduler.pages, scheduler.limits)
        self.depth, self.program = depth, PROGRAM
        self.in_flight: deque[tuple[SchedulerOutput, Rows]] = deque()
        self.requests: dict[int, RankRequest] = {}
        self.outputs: dict[int, list[int]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.routed = RoutedPositions()
        self.steps = 0

    def add(self, item: RankRequest) -> None:
        self.scheduler.add(item)
        params, prompt = item.params, len(item.prompt_token_ids)
        self.reference.add(item.request_id, prompt, params.known_max_tokens, params.priority)
        self.requests[item.request_id] = item
        self.outputs[item.request_id] = []

    def check_outputs(self) -> None:
        """Check that every request had all its tokens, or the first of them if it was aborted."""
        for number, item in self.requests.items():
            tokens_due, reason = expected_outputs(item)
            if self.reasons[number] is FinishReason.ABORT:
                assert self.outputs[number] == tokens_due[: len(self.outputs[number])]
            else:
                assert (self.outputs[number], self.reasons[number]) == (tokens_due, reason)

    def abort(self, request_id: int) -> None:
        progress = self.scheduler.abort(request_id)
        assert (progress is None) == (request_id in self.reasons)
        if progress:
            self.reasons[request_id] = FinishReason.ABORT
            self.reference.end(request_id)
        self.check()

    def step(self, prefill_budget: int | None = None) -> SchedulerOutput:
        scheduled = self.scheduler.schedule(self.program, prefill_budget)
        rows = self.due_rows(scheduled, prefill_budget)
        self.check()
        self.check_batch(scheduled, rows)
        self.steps += 1
        if rows:
            self.in_flight.append((scheduled, rows))
        while len(self.in_flight) > (self.depth if rows else 0):
            self.commit(*self.in_flight.popleft())
        self.check()
        return scheduled

    def due_rows(self, scheduled: SchedulerOutput, prefill_budget: int | None) -> Rows:
        """Return who has which rows of a step: request id, first position, end."""
        return self.reference.schedule(prefill_budget)

    def check(self) -> None:
        """Pages, and who runs and waits, are the reference's."""
        scheduler, reference = self.scheduler, self.reference
        scheduler.check()
        assert scheduler.num_free_pages == reference.num_free
        running = scheduler.table.request_ids[scheduler.running].tolist()
        assert running == [item.request_id for item in reference.running]
        waiting = [live.request_id for live in scheduler.waiting]
        assert waiting == [item.request_id for item in reference.waiting]

    def check_batch(self, scheduled: SchedulerOutput, rows: Rows) -> None:
        (batch,) = scheduled.batches
        ends = batch.seq_lens.tolist()
        starts = (batch.seq_lens - batch.query_lens).tolist()
        request_ids = self.scheduler.table.request_ids[scheduled.req_indices].tolist()
        assert list(zip(request_ids, starts, ends, strict=True)) == rows
        places = [(number, at) for number, start, end in rows for at in range(start, end)]
        assert batch.positions.tolist() == [at for _, at in places]
        sources = batch.future_token_index.tolist()
        for place, token, source in zip(places, batch.token_ids.tolist(), sources, strict=True):
            assert self.fed_token(token, source, *place) == self.token_at(*place)
        limits = self.scheduler.limits
        assert batch.num_tokens <= limits.max_num_tokens
        assert len(self.scheduler.running) <= limits.max_num_requests
        check_values(batch, self.scheduler.pages, Place(0, self.steps, "target"))
        assert len(set(batch.slot_mapping.tolist())) == batch.num_tokens
        tables = Counter(page for row in batch.page_table.tolist() for page in row if page)
        written = {slot // self.scheduler.pages.page_size for slot in batch.slot_mapping.tolist()}
        assert all(tables[page] == 1 for page in written), "what is written is in two tables"
        if self.scheduler.prefixes is None:
            assert max(tables.values(), default=1) == 1, "a page is in two requests' tables"

    def token_at(self, request_id: int, position: int) -> int:
        """The token of a request's prompt and outputs."""
        prompt = self.requests[request_id].prompt_token_ids
        if position < len(prompt):
            return prompt[position]
        return token_of(request_id, position - len(prompt))

    def fed_token(self, token: int, source: int, request_id: int, position: int) -> int:
        """What the model is fed: the given token, or what the step before samples."""
        if source < 0:
            return token
        last, _ = self.in_flight[-1]
        index = last.samples.output_indices[source]
        req_index = last.samples.req_indices[source]
        assert self.scheduler.table.request_ids[req_index] == request_id
        assert index == position - len(self.requests[request_id].prompt_token_ids)
        return token_of(request_id, int(index))

    def commit(self, scheduled: SchedulerOutput, rows: Rows) -> None:
        samples = scheduled.samples
        numbers = self.scheduler.table.request_ids[samples.req_indices].tolist()
        indices = samples.output_indices.tolist()
        sampled = tuple(map(token_of, numbers, indices))
        tokens = SampledTokens(sampled, (None,) * len(sampled))
        progress = self.scheduler.commit(scheduled, tokens, [() for _ in scheduled.scored])
        for item in self.routed.told(scheduled, scheduled.target.positions, progress):
            assert item.request_id not in self.reasons, "a finished request made progress"
            assert item.first_index == len(self.outputs[item.request_id])
            self.outputs[item.request_id] += item.token_ids
            self.routed.check(self.requests[item.request_id], self.outputs[item.request_id])
            if item.finish_reason:
                self.reasons[item.request_id] = item.finish_reason
        self.reference.commit(rows, [number for number, _, _ in rows if number in self.reasons])

    def drain(self) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.steps < 20_000, "the scheduler starves somebody"


def expected_outputs(item: RankRequest) -> tuple[list[int], FinishReason]:
    room = min(item.params.known_max_tokens, MODEL_LEN - len(item.prompt_token_ids))
    tokens = []
    for index in range(room):
        tokens.append(token_of(item.request_id, index))
        if tokens[-1] == STOP_TOKEN:
            return tokens, FinishReason.STOP
    return tokens, FinishReason.LENGTH


def scheduler(num_pages: int, page_size: int = 4, requests: int = 6, tokens: int = 16) -> Scheduler:
    return Scheduler(PageGeometry(num_pages, page_size), Limits(requests, tokens, MODEL_LEN))


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 20), st.integers(-1, 2)),
        st.tuples(st.just("step"), st.none() | st.integers(1, 20), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=150)
@given(actions, st.integers(11, 30), st.integers(1, 40), st.integers(0, 1))
def test_every_request_gets_its_tokens_and_no_page_leaks(
    todo: list[tuple[str, Any, int, int]], num_pages: int, tokens: int, depth: int
) -> None:
    driver = Driver(scheduler(num_pages, tokens=tokens), depth)
    made: dict[int, RankRequest] = {}
    for name, first, second, priority in todo:
        if name == "add":
            made[len(made)] = request(len(made), first, second, priority)
            driver.add(made[len(made) - 1])
        elif name == "abort" and first in made:
            driver.abort(first)
        elif name == "step":
            driver.step(prefill_budget=first)
    driver.drain()
    assert driver.scheduler.num_free_pages == num_pages - 1
    assert driver.requests == made
    driver.check_outputs()


@pytest.mark.parametrize("depth", [0, 1])
def test_page_shortage_preempts_the_youngest_and_loses_no_token(depth: int) -> None:
    driver = Driver(scheduler(num_pages=12, requests=6), depth)
    items = [request(number, 8, 30) for number in range(100, 106)]
    for item in items:
        driver.add(item)
    driver.drain()
    assert driver.scheduler.num_preemptions > 0
    for item in items:
        assert driver.outputs[item.request_id] == expected_outputs(item)[0]


@pytest.mark.parametrize("depth", [0, 1])
def test_the_oldest_request_is_never_preempted(depth: int) -> None:
    driver = Driver(scheduler(num_pages=11, requests=4), depth)
    for number in range(4):
        driver.add(request(number, 12, 28))
    oldest = driver.scheduler.waiting[0]
    computed = 0
    while not oldest.finish_reason:
        driver.step()
        if oldest.status is RequestStatus.RUNNING:
            before, computed = (
                computed,
                driver.scheduler.table.num_computed_tokens[oldest.req_index],
            )
            assert computed >= before, "the oldest request started over"


@pytest.mark.parametrize("depth", [0, 1])
def test_a_lower_priority_is_admitted_first_but_not_before_who_was_preempted(depth: int) -> None:
    driver = Driver(scheduler(num_pages=11, requests=2), depth)
    for number, priority in ((1, 5), (2, 0), (3, 5), (4, -1), (5, 0)):
        driver.add(request(number, 12, 28, priority))
    assert [item.request_id for item in driver.scheduler.waiting] == [4, 2, 5, 1, 3]
    while not driver.scheduler.num_preemptions:
        driver.step()
    driver.add(request(6, 12, 28, -9))
    assert [item.request_id for item in driver.scheduler.waiting] == [2, 6, 5, 1, 3]
    driver.drain()


def test_decoding_comes_before_prefill_chunks() -> None:
    driver = Driver(scheduler(num_pages=40, tokens=8), 0)
    driver.add(request(1, 4, 20))
    driver.step()
    driver.add(request(2, 30, 4))
    lengths = [driver.step().batches[0].query_lens.tolist() for _ in range(4)]
    assert lengths == [[1, 7], [1, 7], [1, 7], [1, 7]]


def test_prompts_get_no_more_than_their_budget_and_decodes_are_not_part_of_it() -> None:
    driver = Driver(scheduler(num_pages=60, tokens=16), 0)
    for number in (1, 2):
        driver.add(request(number, 3, 20))
    driver.step()
    for number, prompt in ((3, 10), (4, 3), (5, 9)):
        driver.add(request(number, prompt, 4))
    steps = [driver.step(prefill_budget=6) for _ in range(4)]
    lengths = [step.target.query_lens.tolist() for step in steps]
    assert lengths == [[1, 1, 6], [1, 1, 4, 2], [1, 1, 1, 1, 5], [1, 1, 1, 1, 4]]
    assert [step.prefill_rows for step in steps] == [6, 6, 6, 4]


def test_nobody_is_admitted_while_an_older_request_lacks_pages() -> None:
    driver = Driver(scheduler(num_pages=11, tokens=16), 0)
    for number, prompt in ((1, 8), (2, 30), (3, 1)):
        driver.add(request(number, prompt, 9))
    table = driver.scheduler.table
    served = [table.request_ids[driver.step().req_indices].tolist() for _ in range(3)]
    assert driver.scheduler.num_free_pages == 1, "enough for the third, not for the second"
    assert served == [[1, 2], [1, 2], [1]]
    driver.drain()


def test_a_chunk_samples_only_when_it_completes_the_prompt() -> None:
    driver = Driver(scheduler(num_pages=40, tokens=8), 0)
    driver.add(request(1, 20, 2))
    steps = [driver.step() for _ in range(3)]
    assert [len(step.samples) for step in steps] == [0, 0, 1]
    assert [step.batches[0].positions[0] for step in steps] == [0, 8, 16]


def test_with_overlap_the_next_token_comes_from_the_device() -> None:
    driver = Driver(scheduler(num_pages=40), 1)
    driver.add(request(1, 5, 4))
    first, second = driver.step(), driver.step()
    assert first.batches[0].future_token_index.tolist() == [-1] * 5
    assert second.batches[0].future_token_index.tolist() == [0]
    assert second.samples.output_indices.tolist() == [1]


def test_a_request_that_stops_while_its_next_step_runs_drops_that_token() -> None:
    stopping = next(n for n in range(1000) if token_of(n, 0) == STOP_TOKEN)
    driver = Driver(scheduler(num_pages=40), 1)
    driver.add(request(stopping, 5, 9))
    driver.step()
    driver.step()  # launched before the stop token was looked at
    assert driver.outputs[stopping] == [STOP_TOKEN]
    assert driver.scheduler.num_free_pages < 39, "pages stay until the launched step is done"
    driver.drain()
    assert driver.outputs[stopping] == [STOP_TOKEN]
    assert driver.scheduler.num_free_pages == 39


def test_prompt_logprob_rows_cover_the_prompt_once_despite_chunks_and_preemption() -> None:
    driver = Driver(scheduler(num_pages=12, tokens=8), 0)
    items = []
    for number in range(4):
        params = SamplingParams(max_tokens=20, prompt_logprobs=1)
        items.append(RankRequest(number, tuple(range(1, 15)), params, 0, frozenset()))
        driver.add(items[-1])
    seen: dict[int, list[int]] = {item.request_id: [] for item in items}
    while driver.scheduler.has_work:
        for chunk in driver.step().scored:
            seen[chunk.state.request_id] += range(chunk.score_start, chunk.score_end)
    assert driver.scheduler.num_preemptions > 0
    assert all(positions == list(range(13)) for positions in seen.values())


def test_a_step_makes_nothing_for_what_none_of_its_requests_has() -> None:
    """Neither do those cost it anything that had some of it and have left."""
    rank = scheduler(20)
    brings = replace(request(1, 5, 1), replay=np.zeros((5, 2, 1), np.int16))
    for each in (brings, request(2, 5, 9)):
        rank.add(each)
    before = rank.schedule(PROGRAM)
    assert (len(before.routed.rows), len(before.target.replays)) == (5, 5)
    rank.commit(before, SampledTokens((11, 11), (None, None)))
    step = rank.schedule(PROGRAM)
    batch = step.target
    assert batch.num_tokens == 1
    assert [*rank.table.returns_routing, *rank.table.replays_routing] == []
    assert [step.routed, step.states] == [NO_ROUTED_ROWS, NO_MOVES]
    assert [batch.states, batch.embeds, batch.images, batch.replays] == [
        NO_STATES, NO_EMBEDS, NO_IMAGES, NO_REPLAYS,
    ]  # fmt: skip
    assert batch.rope_positions is AS_POSITIONS
    assert batch.lengths_are_bounds is ALL_EXACT


def test_metadata_derives_its_batch_size_from_the_batch() -> None:
    import torch

    driver = Driver(scheduler(num_pages=40, tokens=40), 0)
    for number in range(3):
        driver.add(request(number, 5 + number, 4))
    (batch,) = driver.step().batches
    pages = driver.scheduler.pages
    metadata = AttentionMetadata.build(batch, pages, Place(0, 0, "target"), torch.device("cpu"))
    assert metadata.batch_size == 3
    assert metadata.num_tokens == 5 + 6 + 7
    assert metadata.cu_seqlens_q.tolist() == [0, 5, 11, 18]
    with pytest.raises(AttributeError):
        metadata.batch_size = 4  # type: ignore[misc]
