"""The budget of prompt tokens that all ranks choose alike from agreed times of steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.parallel.prefill_budget import (
    PrefillBudget,
    StepLoad,
    budget_policy,
    no_budget,
)

LIMIT = 2048
Curve = Callable[[int], float]  # microseconds of a step by its rows of prefill


class Step(NamedTuple):
    budget: int | None
    rows: int
    us: float


class Server:
    """Steps as a curve says, in which somebody waits for tokens; times are known `lag` later."""

    def __init__(self, policy: PrefillBudget, lag: int, noise: float = 0.0) -> None:
        self.policy = policy
        self.budget: int | None = None
        self.steps: list[Step] = []
        self._times = deque([0] * lag)
        self._random, self._noise = np.random.default_rng(7), noise

    def step(self, curve: Curve, wanted: int = LIMIT, num_sampling: int = 1) -> Step:
        rows = min(wanted, LIMIT if self.budget is None else self.budget)
        us = curve(rows) * max(0.2, self._random.normal(1, self._noise))
        self.steps.append(Step(self.budget, rows, us))
        self._times.append(round(us))
        load = StepLoad(rows, num_sampling, self._times.popleft())
        self.budget = self.policy(load)
        return self.steps[-1]

    def run(self, curve: Curve, steps: int) -> list[Step]:
        """Prompts fill what there is for them in two steps of three."""
        return [self.step(curve, LIMIT if number % 3 else 0) for number in range(steps)]


def mean_full_us(steps: Sequence[Step]) -> float:
    return fmean(step.us for step in steps if step.rows == step.budget)


def line(decode_us: float, row_us: float, any_us: float = 0.0) -> Curve:
    return lambda rows: decode_us + (any_us if rows else 0) + row_us * rows


@settings(max_examples=60, deadline=None)
@given(
    decode=st.floats(1e3, 2e4), any_share=st.floats(0, 0.5), fill=st.floats(0.2, 0.9),
    target=st.floats(1.2, 4), noise=st.sampled_from([0.0, 0.05, 0.2]), lag=st.integers(1, 2),
)  # fmt: skip
def test_steps_that_use_it_up_come_to_the_target(
    decode: float, any_share: float, fill: float, target: float, noise: float, lag: int
) -> None:
    """With a time for any prefill at all, and none for the first token of it; noise or not."""
    target_us = decode * target
    any_us = any_share * (target_us - decode)
    curve = line(decode, (target_us - decode - any_us) / (fill * LIMIT), any_us)
    server = Server(PrefillBudget(target_us / 1e3, LIMIT, lag), lag, noise)
    server.run(curve, 120)
    assert mean_full_us(server.run(curve, 120)) == pytest.approx(target_us, rel=0.03 + noise / 5)


@pytest.mark.parametrize("lag", [1, 2])
def test_a_curve_that_is_no_line_comes_to_the_target_too(lag: int) -> None:
    def stairs(rows: int) -> float:
        return 7000 + 90 * rows**0.65 + 1500 * (rows // 256)

    server = Server(PrefillBudget(16.0, LIMIT, lag), lag, 0.05)
    server.run(stairs, 120)
    assert mean_full_us(server.run(stairs, 300)) == pytest.approx(16_000, rel=0.1)


@pytest.mark.parametrize("lag", [1, 2])
def test_it_follows_a_change_both_ways(lag: int) -> None:
    server = Server(PrefillBudget(20.0, LIMIT, lag), lag, 0.02)
    for row_us in (10.0, 25.0, 8.0):
        curve = line(8000, row_us)
        server.run(curve, 60)
        assert mean_full_us(server.run(curve, 60)) == pytest.approx(20_000, rel=0.05)
        assert server.budget == pytest.approx(12_000 / row_us, rel=0.1)


def test_a_pause_is_not_taken_for_load_for_long() -> None:
    server = Server(PrefillBudget(20.0, LIMIT, 1), 1)
    curve = line(8000, 12.0)
    server.run(curve, 90)
    before = server.budget
    server.step(lambda rows: 5e6)
    lowest = min(step.budget or 0 for step in server.run(curve, 6))
    assert before is not None
    assert before / 3 < lowest < before
    server.run(curve, 60)
    assert server.budget == pytest.approx(before, rel=0.03)


@pytest.mark.parametrize(("row_us", "budget"), [(0.0, LIMIT), (1.0, LIMIT), (1000.0, LIMIT // 8)])
def test_its_ends(row_us: float, budget: int) -> None:
    server = Server(PrefillBudget(20.0, LIMIT, 1), 1)
    server.run(line(8000, row_us), 30)
    assert server.budget == budget


def test_where_decoding_alone_is_too_slow_prompts_keep_an_eighth() -> None:
    server = Server(PrefillBudget(20.0, LIMIT, 1), 1)
    server.run(line(30_000, 1.0), 30)
    assert server.budget == LIMIT // 8


LOADS = st.lists(
    st.builds(StepLoad, st.integers(0, 5000), st.integers(0, 3), st.integers(0, 2**40)),
    max_size=60,
)


@given(
    loads=LOADS, limit=st.integers(1, 5000), lag=st.integers(1, 2),
    max_step_ms=st.floats(1e-3, 6e4),
)  # fmt: skip
def test_all_ranks_choose_alike_within_bounds_and_none_starves(
    loads: list[StepLoad], limit: int, lag: int, max_step_ms: float
) -> None:
    one, two = (PrefillBudget(max_step_ms, limit, lag) for _ in range(2))
    for load in loads:
        budget = one(load)
        assert budget == two(load)
        assert (budget is None) == (load.num_sampling == 0)
        if budget is not None:
            assert 1 <= -(-limit // 8) <= budget <= limit


def test_while_nobody_waits_there_is_no_limit_and_nothing_to_learn() -> None:
    server = Server(PrefillBudget(20.0, LIMIT, 1), 1)
    server.run(line(8000, 12.0), 60)
    before = server.budget
    server.step(line(8000, 12.0), 0, num_sampling=0)
    prefills = [server.step(line(8000, 99.0), num_sampling=0) for _ in range(30)]
    assert {(step.budget, step.rows) for step in prefills} == {(None, LIMIT)}
    server.step(line(8000, 99.0), num_sampling=1)  # of its last token somebody waits for more
    server.step(line(8000, 12.0), 0)
    assert server.budget == before


def test_few_rows_tell_nothing() -> None:
    server = Server(PrefillBudget(20.0, LIMIT, 1), 1)
    server.run(line(8000, 12.0), 60)
    before = server.budget
    for _ in range(30):
        server.step(line(8000, 500.0), wanted=5)
    server.step(line(8000, 12.0), 0)
    assert server.budget == before


def test_without_a_target_there_is_none() -> None:
    assert budget_policy(None, LIMIT, 1) is no_budget
    assert no_budget(StepLoad(9, 9, 9)) is None
    policy = budget_policy(12.5, LIMIT, 0)
    assert isinstance(policy, PrefillBudget)
    assert (policy.min_rows, policy.max_rows) == (LIMIT // 8, LIMIT)
