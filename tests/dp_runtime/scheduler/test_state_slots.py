"""Slots of recurrent states: each holds the state of its request's tokens whenever rows run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import PageGeometry, Place
from dp_runtime.core.batch import NULL_SLOT
from dp_runtime.core.recurrent_metadata import check_state_slots
from dp_runtime.core.request import RankRequest
from dp_runtime.core.step_program import Program
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.abandonment import abandon_steps
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from tests.dp_runtime.reference_scheduler import Rows
from tests.dp_runtime.scheduler.test_scheduler import (
    MODEL_LEN,
    STOP_TOKEN,
    Driver,
    request,
    token_of,
)

Written = tuple[int, int]  # request id, position
REQUESTS = 4


def number_of(place: int) -> int:
    """Number requests so that those of the first seven places stop by a token, after 7 - place."""
    return 5 + 7 * place


def limits(tokens: int = 16, drafts: int = 0, requests: int = REQUESTS) -> Limits:
    return Limits(requests, tokens, MODEL_LEN, drafts, keeps_state=True)


class StateDriver(Driver):
    """A device with dirty states, which steps change in the order of their launch.

    A state is the list of the rows that made it, and can't go back.
    """

    def __init__(self, num_pages: int, tokens: int, depth: int, requests: int = REQUESTS) -> None:
        own = limits(tokens, requests=requests)
        super().__init__(Scheduler(PageGeometry(num_pages, 4), own), depth)
        self.states: list[list[Written]] = [[(-1, -1)] for _ in range(own.num_state_slots)]
        self.num_fresh: dict[int, int] = {}

    def check_batch(self, scheduled: SchedulerOutput, rows: Rows) -> None:
        super().check_batch(scheduled, rows)
        batch = scheduled.target
        check_state_slots(batch, len(self.states), Place(0, self.steps, "target"))
        slots, fresh = batch.states.slots.tolist(), batch.states.is_fresh.tolist()
        for slot, is_fresh, (number, start, end) in zip(slots, fresh, rows, strict=True):
            if is_fresh:
                self.states[slot] = []
                self.num_fresh[number] = self.num_fresh.get(number, 0) + 1
            due = [(number, position) for position in range(start)]
            assert self.states[slot] == due, "the state is not that of the tokens before these rows"
            self.states[slot] += [(number, position) for position in range(start, end)]

    def abandon(self) -> None:
        """End an epoch: launched steps have run, but nobody hears of them."""
        self.in_flight.clear()
        abandon_steps(self.scheduler)
        known = {
            number: len(item.prompt_token_ids) + len(self.outputs[number])
            for number, item in self.requests.items()
        }
        self.reference.abandon(known)
        self.check()

    def check(self) -> None:
        super().check()
        table = self.scheduler.table
        taken = table.state_slots(np.array(table.req_indices, np.int64)).tolist()
        assert len({*taken}) == len(taken) < len(self.states)
        assert all(NULL_SLOT < slot < len(self.states) for slot in taken)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 20), st.integers(-1, 2)),
        st.tuples(st.just("step"), st.none() | st.integers(1, 20), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 20), st.just(0), st.just(0)),
        st.tuples(st.just("abandon"), st.just(0), st.just(0), st.just(0)),
    ),
    max_size=60,
)


# vllm #32118, #47466, #53051, sglang-jax #1039: first chunks of any length on dirty slots.
@settings(deadline=None, max_examples=200)
@given(
    actions, st.integers(11, 30), st.integers(4, 40), st.integers(0, 1), st.integers(1, REQUESTS)
)
def test_a_state_is_that_of_its_request_s_tokens_whatever_happens(
    todo: list[tuple[str, Any, int, int]], num_pages: int, tokens: int, depth: int, requests: int
) -> None:
    driver = StateDriver(num_pages, tokens, depth, requests)
    made: list[RankRequest] = []
    for name, first, second, priority in todo:
        if name == "add":
            made.append(request(number_of(len(made)), first, second, priority))
            driver.add(made[-1])
        elif name == "abort" and first < len(made):
            driver.abort(made[first].request_id)
        elif name == "step":
            driver.step(prefill_budget=first)
        elif name == "abandon":
            driver.abandon()
    driver.drain()
    assert not driver.scheduler.table.req_indices, "a slot is not given back"
    assert [*driver.requests.values()] == made
    driver.check_outputs()


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("prompt", range(1, 9))
def test_a_request_is_fresh_in_its_first_chunk_and_only_there(prompt: int, depth: int) -> None:
    driver = StateDriver(num_pages=40, tokens=4, depth=depth)
    driver.add(request(100, prompt, 9))
    fresh = []
    while driver.scheduler.has_work:
        fresh += driver.step().target.states.is_fresh.tolist()
    assert fresh == [True] + [False] * (len(fresh) - 1)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_preempted_request_is_fresh_again(depth: int) -> None:
    driver = StateDriver(num_pages=11, tokens=16, depth=depth)
    for number in range(100, 104):
        driver.add(request(number, 8, 30))
    driver.drain()
    assert driver.scheduler.num_preemptions > 0
    assert sum(driver.num_fresh.values()) == 4 + driver.scheduler.num_preemptions


def test_a_slot_is_given_back_once_the_step_in_flight_is_committed() -> None:
    """The next request waits for it, although fewer than max_num_requests run."""
    stopping = next(n for n in range(1000) if token_of(n, 0) == STOP_TOKEN)
    driver = StateDriver(num_pages=40, tokens=16, depth=1)
    for number in (stopping, 2000, 2001, 2002, 2003):
        driver.add(request(number, 3, 9))
    slots = [driver.step().target.states.slots.tolist() for _ in range(2)]
    assert slots == [[1, 2, 3, 4]] * 2
    assert len(driver.scheduler.running) == REQUESTS - 1, "its end was seen as its next step ran"
    waits, begins = driver.step(), driver.step()
    assert waits.target.states.slots.tolist() == [2, 3, 4]
    assert begins.target.states.slots.tolist() == [2, 3, 4, 1]
    assert begins.target.states.is_fresh.tolist() == [False, False, False, True]
    driver.drain()


def test_who_was_not_in_an_abandoned_step_keeps_the_state() -> None:
    driver = StateDriver(num_pages=40, tokens=4, depth=0)
    for number in (100, 101):
        driver.add(request(number, 10, 4))
    driver.step()  # 4 tokens of the first
    driver.abandon()
    going_on = driver.step().target
    assert going_on.positions.tolist() == [4, 5, 6, 7]
    assert going_on.states.is_fresh.tolist() == [False]
    driver.drain()


def test_who_was_in_one_is_computed_again_from_the_first_token() -> None:
    driver = StateDriver(num_pages=40, tokens=16, depth=1)
    driver.add(request(100, 5, 9))
    for _ in range(4):
        driver.step()
    known = 5 + len(driver.outputs[100])
    driver.abandon()
    again = driver.step().target
    assert (again.positions.tolist(), again.states.is_fresh.tolist()) == ([*range(known)], [True])
    driver.drain()


@pytest.mark.parametrize("keeps_state", [False, True])
def test_rows_that_are_fed_again_for_a_draft_cost_the_state(keeps_state: bool) -> None:
    """A state has no token less; pages do."""
    scheduler = Scheduler(
        PageGeometry(40, 4), Limits(REQUESTS, 16, MODEL_LEN, 2, keeps_state=keeps_state)
    )
    scheduler.add(request(100, 5, 9))
    step = scheduler.schedule(Program.speculative(2))
    scheduler.commit(step, SampledTokens((11,), (None,)))
    abandon_steps(scheduler)
    again = scheduler.schedule(Program.speculative(2)).target
    start = 0 if keeps_state else 4
    assert again.positions.tolist() == [*range(start, 6)]
    assert again.states.is_fresh.tolist() == [True] * keeps_state


def test_only_the_target_s_rows_have_a_state() -> None:
    scheduler = Scheduler(PageGeometry(40, 4), limits(drafts=2))
    scheduler.add(request(100, 5, 9))
    scheduler.commit(scheduler.schedule(Program.speculative(2)), SampledTokens((11,), (None,)))
    draft, target, extend = scheduler.schedule(Program.speculative(2)).batches
    assert [len(batch.states.slots) for batch in (draft, target, extend)] == [0, 1, 0]


def test_a_model_without_recurrent_layers_has_no_slots() -> None:
    plain = Limits(REQUESTS, 16, MODEL_LEN)
    assert (plain.num_state_slots, plain.num_table_rows) == (0, 2 * REQUESTS)
    scheduler = Scheduler(PageGeometry(40, 4), plain)
    scheduler.add(request(100, 5, 9))
    batch = scheduler.schedule(Program.speculative(2)).target
    assert (len(batch.states.slots), len(batch.states.is_fresh)) == (0, 0)
    assert limits().num_state_slots == REQUESTS + 1
