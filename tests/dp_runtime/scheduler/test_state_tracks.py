"""Recurrent states behind cached pages: each is that of its page's tokens, and none is lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.metrics.status import StateUse
from dp_runtime.scheduler.limits import Limits
from tests.dp_runtime.scheduler.state_device import StateDevice

PAGE = 16
MODEL_LEN = 400


def limits(
    checkpoints: int, tokens: int = 512, requests: int = 4, drafts: int = 0, interval: int = PAGE,
    awaited: int = 256,
) -> Limits:  # fmt: skip
    return Limits(
        requests, tokens, MODEL_LEN, drafts, keeps_state=True,
        num_state_checkpoints=checkpoints, state_track_interval=interval,
        min_awaited_tokens=awaited,
    )  # fmt: skip


def prompt_of(family: int, length: int) -> list[int]:
    """Families have their first 40 tokens in common."""
    return [100 + at if at < 40 else 200 + 500 * family + at for at in range(length)]


def alone(device: StateDevice, prompt: list[int], outputs: int, drafts: int = 0) -> int:
    """Serve one request; return where it began."""
    number = device.add(prompt, outputs)
    device.drain(drafts)
    (hit,) = device.hits[number]
    return hit


def text_of(device: StateDevice, number: int) -> list[int]:
    one = device.sequences[number]
    return [*one.request.prompt_token_ids, *one.outputs]


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(0, 2), st.integers(20, 180), st.integers(1, 70)),
        st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 180), st.integers(1, 70)),
        st.tuples(st.just("follow"), st.integers(0, 9), st.integers(0, 30), st.integers(1, 40)),
        st.tuples(st.just("step"), st.none() | st.integers(1, 90), st.integers(0, 12), st.just(0)),
        st.tuples(st.just("step"), st.none(), st.integers(1, 12), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 9), st.just(0), st.just(0)),
        st.tuples(st.just("abandon"), st.just(0), st.just(0), st.just(0)),
    ),
    min_size=12,
    max_size=25,
)


def play(device: StateDevice, todo: list[tuple[str, Any, int, int]], drafts: int = 0) -> None:
    for name, first, second, outputs in todo:
        if name == "add":
            device.add(prompt_of(first, second), outputs, stops=True)
        elif name == "follow" and first < len(device.sequences):
            one = device.sequences[first]
            text = [*one.request.prompt_token_ids, *one.outputs, *range(300, 300 + second)]
            device.add(text[: MODEL_LEN - 1], outputs, stops=True)
        elif name == "abort" and first < len(device.sequences):
            device.abort(first)
        elif name == "step":
            for _ in range(second):
                device.step(drafts, first)
        elif name == "abandon":
            device.abandon()
    device.drain(drafts)
    assert not device.scheduler.table.req_indices
    assert not device.scheduler.states.taken, "a slot is not given back"


# vllm #43559, #34587, sglang #29973: whatever a page has behind it is the state of its tokens.
@settings(deadline=None, max_examples=20)
@given(
    actions, st.integers(27, 60), st.integers(1, 6), st.sampled_from([20, 70, 200]),
    st.integers(0, 1), st.sampled_from([PAGE, 3 * PAGE]), st.sampled_from([PAGE, 64, MODEL_LEN]),
)  # fmt: skip
def test_states_are_those_of_their_pages_whatever_happens(
    todo: list[tuple[str, Any, int, int]], num_pages: int, checkpoints: int, tokens: int,
    depth: int, interval: int, awaited: int,
) -> None:  # fmt: skip
    own = limits(checkpoints, tokens, interval=interval, awaited=awaited)
    play(StateDevice(num_pages, own, PAGE, depth), todo)


# vllm #43559, #53912, #47194, #48375, sglang #24221, #29792: no rejected draft is in a state.
@settings(deadline=None, max_examples=20)
@given(
    actions, st.integers(27, 60), st.integers(1, 6), st.sampled_from([20, 70, 200]),
    st.integers(0, 1), st.integers(1, 3),
)  # fmt: skip
def test_states_hold_accepted_drafts_alone(
    todo: list[tuple[str, Any, int, int]], num_pages: int, checkpoints: int, tokens: int,
    depth: int, drafts: int,
) -> None:  # fmt: skip
    own = limits(checkpoints, tokens, drafts=drafts)
    play(StateDevice(num_pages, own, PAGE, depth), todo, drafts)


@settings(deadline=None, max_examples=12)
@given(actions, st.integers(27, 60), st.integers(1, 3), st.integers(0, 1), st.integers(0, 3))
def test_without_a_buffer_a_request_leaves_the_state_that_it_ends_with(
    todo: list[tuple[str, Any, int, int]], num_pages: int, checkpoints: int, depth: int, drafts: int
) -> None:
    own = limits(checkpoints, 70, drafts=drafts, interval=0)
    play(StateDevice(num_pages, own, PAGE, depth), todo, drafts)


# vllm #51250: a cache that never hits. LMCache #4984: pages alone are no hit.
@pytest.mark.parametrize(("drafts", "depth"), [(0, 0), (0, 1), (3, 0), (3, 1)])
def test_the_next_turn_goes_on_behind_the_last(drafts: int, depth: int) -> None:
    """Within an output a state is left every 32 tokens, and near the end of the prompt."""
    device = StateDevice(60, limits(8, drafts=drafts, interval=32), PAGE, depth)
    assert alone(device, prompt_of(0, 90), 41, drafts) == 0
    turn = text_of(device, 0)
    assert len(turn) == 131
    assert alone(device, [*turn, 5, 6], 9, drafts) == 128
    assert alone(device, turn[:100], 9, drafts) == 96
    assert alone(device, turn[:91], 9, drafts) == 64, "of the prompt, where the kernels have it"
    assert alone(device, turn[:64], 9, drafts) == 0, "a token is left to compute"


def test_the_second_to_part_leaves_the_state_for_the_third() -> None:
    """Three prompts have two pages in common: their states are only known to part there later."""
    device = StateDevice(80, limits(8, interval=0x1000), PAGE)
    prompts = [[*range(100, 132), *range(1000 * n, 1000 * n + 100)] for n in range(2, 6)]
    assert [alone(device, prompt, 3) for prompt in prompts] == [0, 0, 32, 32]


def test_pages_of_a_conversation_that_goes_on_are_no_branch() -> None:
    """Its state is better left near the new prompt's end."""
    device = StateDevice(60, limits(8, interval=0x1000), PAGE)
    assert alone(device, prompt_of(0, 90), 41) == 0
    turn = [*text_of(device, 0), *range(800, 850)]
    assert alone(device, turn, 3) == 64
    assert alone(device, [*text_of(device, 1), 5], 3) == 64 + 64


# vllm #34587: what a step writes belongs to nobody until it is committed.
def test_a_state_is_found_once_its_step_is_committed() -> None:
    device = StateDevice(60, limits(8), PAGE, depth=1)
    device.add(prompt_of(0, 70), 1)
    states = device.scheduler.page_table.allocator.cache.states
    device.step()
    assert len(device.scheduler.states.taken) == 1
    device.add(prompt_of(0, 70), 1)
    device.step()
    assert len(states) == 1
    assert device.hits[1] == [0], "it began before"
    device.drain()
    assert alone(device, prompt_of(0, 70), 1) == 64


# sglang #26770, #27118: no slot at the boundary is no state, and none is lost.
def test_with_no_slot_free_requests_go_on_and_leave_nothing() -> None:
    device = StateDevice(60, limits(1, requests=3), PAGE, depth=1)
    for family in range(3):
        device.add(prompt_of(family, 70 + family), 40)
    device.drain()
    assert not device.scheduler.states.taken
    states = device.scheduler.page_table.allocator.cache.states
    assert len(states) == 1
    assert states.num_evictions > 0


def test_slots_in_use_are_those_of_requests_and_of_cached_pages() -> None:
    device = StateDevice(60, limits(2, requests=3), PAGE)
    states = device.scheduler.states
    assert states.use == StateUse(3, 3, 2, 2, 0)
    device.add(prompt_of(0, 70), 2)
    device.step()
    assert states.use == StateUse(3, 2, 2, 1, 0)
    device.drain()
    assert states.use == StateUse(3, 3, 2, 1, 0)
    for family in (1, 2, 3):
        alone(device, [1000 + family] * 70, 1)
    assert states.use == StateUse(3, 3, 2, 0, 2)
    assert len(states.checkpoints) == 2


def test_of_an_output_s_states_the_last_is_given_up_last() -> None:
    device = StateDevice(60, limits(4), PAGE)
    alone(device, prompt_of(0, 70), 150)
    allocator = device.scheduler.page_table.allocator
    assert len(allocator.cache.states) == 4
    assert alone(device, [*text_of(device, 0), 5], 1) == len(text_of(device, 0)) // PAGE * PAGE


# sglang #24221: a request that is preempted goes on from the state of committed tokens.
@pytest.mark.parametrize(("drafts", "depth"), [(0, 1), (2, 0)])
def test_a_preempted_request_goes_on_from_a_state_that_is_left(drafts: int, depth: int) -> None:
    device = StateDevice(28, limits(8, drafts=drafts), PAGE, depth)
    for family in range(3):
        device.add(prompt_of(family, 100), 90)
    device.drain(drafts)
    assert device.scheduler.num_preemptions > 0
    again = [hits[1:] for hits in device.hits.values() if len(hits) > 1]
    assert any(hit >= 64 for hits in again for hit in hits)


# sglang #24954, #29792: steps in flight when an epoch ends give nothing away.
@pytest.mark.parametrize("drafts", [0, 2])
def test_after_an_abandoned_step_a_request_goes_on_from_a_committed_state(drafts: int) -> None:
    device = StateDevice(60, limits(8, drafts=drafts), PAGE, depth=1)
    device.add(prompt_of(0, 70), 60)
    while len(device.sequences[0].outputs) < 30:
        device.step(drafts)
    device.abandon()
    assert not device.scheduler.states.taken
    assert device.hits[0][1] >= 80
    device.abandon()
    device.drain(drafts)


@pytest.mark.parametrize("depth", [0, 1])
def test_without_a_buffer_a_hit_ends_where_a_request_ended(depth: int) -> None:
    """The last token of an output is not computed."""
    device = StateDevice(60, limits(4, interval=0), PAGE, depth)
    alone(device, prompt_of(0, 70), 11)
    assert len(device.scheduler.page_table.allocator.cache.states) == 1
    assert alone(device, [*text_of(device, 0), 5], 2) == 80
    alone(device, prompt_of(1, 70), 20)
    assert alone(device, text_of(device, 2), 2) == 0


@pytest.mark.parametrize("interval", [0, PAGE])
@pytest.mark.parametrize("depth", [0, 1])
def test_an_aborted_prompt_leaves_the_state_it_had_come_to(interval: int, depth: int) -> None:
    device = StateDevice(60, limits(4, tokens=70, interval=interval), PAGE, depth)
    number = device.add(prompt_of(0, 200), 5)
    device.step()
    device.step()
    device.abort(number)
    device.step()  # nothing but the commit of what was in flight
    assert alone(device, prompt_of(0, 200), 2) == 128


def test_a_prompt_whose_last_chunk_is_short_leaves_the_state_before_it() -> None:
    device = StateDevice(60, limits(4, tokens=128), PAGE)
    assert [alone(device, prompt_of(0, 150), 1) for _ in range(2)] == [0, 128]


@pytest.mark.parametrize("depth", [0, 1])
def test_alike_prompts_wait_for_the_state_that_the_first_will_leave(depth: int) -> None:
    device = StateDevice(90, limits(8, requests=4, awaited=64), PAGE, depth)
    for _ in range(3):
        device.add(prompt_of(0, 140), 5)
    device.add(prompt_of(1, 140), 5)
    device.drain()
    assert [hits for (hits,) in device.hits.values()] == [0, 128, 128, 0], (
        "40 tokens leave no state"
    )


def test_nobody_waits_for_a_state_that_no_one_will_leave() -> None:
    device = StateDevice(90, limits(8, requests=4, awaited=64, interval=0), PAGE)
    for _ in range(3):
        device.add(prompt_of(0, 140), 5)
    assert device.step().prefill_rows == 3 * 140
    device.drain()
