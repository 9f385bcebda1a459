"""Requests change their status at one place, and every state comes and goes with the row."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.request import FinishReason, RankRequest
from dp_runtime.scheduler.lifecycle import RequestLifecycle
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.request_state import RequestState, RequestStatus
from dp_runtime.scheduler.request_table import RequestTable
from dp_runtime.scheduler.scheduler import Scheduler
from tests.dp_runtime.scheduler.test_scheduler import (
    MODEL_LEN,
    Driver,
    actions,
    expected_outputs,
    request,
)


class TokenLog:
    """A kind of state that follows from a request's tokens, and knows when it should be there."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.in_flight: Callable[[], Iterable[int]] = tuple
        self.num_added = 0

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        assert req_index not in self.tokens
        due = expected_outputs(request)[0]
        assert list(outputs) == due[: len(outputs)], "not all tokens before it are known"
        self.tokens[req_index] = [*request.prompt_token_ids, *outputs]
        self.num_added += 1

    def remove(self, req_index: int) -> None:
        assert req_index not in self.in_flight(), "a step in flight reads it"
        del self.tokens[req_index]

    def check(self, req_indices: Sequence[int]) -> None:
        assert sorted(self.tokens) == sorted(req_indices)


def in_flight(driver: Driver) -> list[int]:
    """The rows of the table in steps that are launched and not being committed."""
    return [index for step, _ in driver.in_flight for index in step.req_indices.tolist()]


@settings(deadline=None, max_examples=100)
@given(actions, st.integers(11, 30), st.integers(1, 40), st.integers(0, 1))
def test_a_new_kind_of_state_is_one_class(
    todo: list[tuple[str, int, int, int]], num_pages: int, tokens: int, depth: int
) -> None:
    log, count = TokenLog(), 0
    limits = Limits(6, tokens, MODEL_LEN)
    driver = Driver(Scheduler(PageGeometry(num_pages, 4), limits, [log]), depth)
    log.in_flight = partial(in_flight, driver)
    for name, first, second, priority in todo:
        if name == "add":
            driver.add(request(count, first, second, priority))
            count += 1
        elif name == "abort" and first < count:
            driver.abort(first)
        elif name == "step":
            driver.step()
    driver.drain()
    assert not log.tokens


@pytest.mark.parametrize("depth", [0, 1])
def test_a_preempted_request_begins_its_state_anew(depth: int) -> None:
    log = TokenLog()
    driver = Driver(Scheduler(PageGeometry(12, 4), Limits(6, 16, MODEL_LEN), [log]), depth)
    for number in range(100, 106):
        driver.add(request(number, 8, 30))
    driver.drain()
    assert driver.scheduler.num_preemptions > 0
    assert log.num_added == 6 + driver.scheduler.num_preemptions


def one_running() -> tuple[RequestLifecycle, RequestState]:
    lifecycle = RequestLifecycle(RequestTable(2), ())
    state = RequestState(request(1, 3, 4), 4)
    lifecycle.add(state)
    lifecycle.transition(state, RequestStatus.RUNNING)
    return lifecycle, state


def test_a_row_is_held_while_a_step_is_in_flight() -> None:
    lifecycle, state = one_running()
    lifecycle.table.num_inflight_steps[state.req_index] = 1
    lifecycle.transition(state, RequestStatus.PREEMPTED)
    lifecycle.settle()
    lifecycle.check()
    assert (state.status, state.req_index >= 0) == (RequestStatus.PREEMPTED, True)
    state.outputs += [5, 6]  # what the step gave
    assert lifecycle.num_queued_tokens == 5
    lifecycle.table.num_inflight_steps[state.req_index] = 0
    lifecycle.settle()
    lifecycle.check()
    assert (state.status, state.req_index) == (RequestStatus.WAITING, -1)
    assert lifecycle.num_queued_tokens == 5


def test_a_preempted_request_may_stop_by_the_token_in_flight() -> None:
    lifecycle, state = one_running()
    lifecycle.transition(state, RequestStatus.PREEMPTED)
    lifecycle.finish(state, FinishReason.STOP)
    assert not lifecycle.waiting
    lifecycle.settle()
    lifecycle.check()
    assert (state.status, len(lifecycle)) == (RequestStatus.ENDED, 0)


@pytest.mark.parametrize("status", [RequestStatus.WAITING, RequestStatus.ENDED])
def test_a_running_request_gives_its_row_back_by_way_of_a_step(status: RequestStatus) -> None:
    lifecycle, state = one_running()
    with pytest.raises(AssertionError, match=r"request 1: RequestStatus\.RUNNING -> "):
        lifecycle.transition(state, status)


def test_a_request_ends_once() -> None:
    lifecycle, state = one_running()
    lifecycle.finish(state, FinishReason.ABORT)
    lifecycle.settle()
    with pytest.raises(AssertionError, match=r"request 1: RequestStatus\.ENDED -> "):
        lifecycle.finish(state, FinishReason.STOP)
