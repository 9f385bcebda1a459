"""Serving with `max_step_ms`: the same tokens, in steps that hold prompts back if they are slow."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dp_runtime import Engine, SamplingParams
from dp_runtime.core.request import TokensPrompt
from dp_runtime.parallel.prefill_budget import StepLoad
from dp_runtime.runner.step_loop import StepLoop
from tests.product_cases import random_prompt
from tests.serving import check_pages_free, loops_of
from tests.speculative_cases import TRAINED, engine_of

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=24)
PROMPTS = [random_prompt(length, "held") for length in (3, 90, 17, 70, 1, 99, 64, 41, 8, 80)]
TOKENS, LEAST = 64, 8
NEVER_MS, ALWAYS_MS = 1e-3, 6e4  # targets that no step meets, and that every step meets


def budgeted(num_steps: int, max_step_ms: float | None, **fields: Any) -> Engine:
    return engine_of(TRAINED, num_steps, max_num_tokens=TOKENS, max_step_ms=max_step_ms, **fields)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_tokens_are_the_same_and_no_step_takes_more_of_a_prompt(
    num_steps: int, overlap: bool
) -> None:
    with budgeted(num_steps, None, overlap=overlap) as engine:
        plain = engine.generate(PROMPTS, GREEDY)
        report = engine.report()
        assert (report.prefill_budget, report.held_back_steps) == (0, (0, 0))
        assert "prefill budget" not in str(report)
    with budgeted(num_steps, NEVER_MS, overlap=overlap) as engine:
        outputs = engine.generate(PROMPTS, GREEDY)
        check_pages_free(engine)
        report, flights = engine.report(), engine.flight_record().ranks
    assert [one.token_ids for one in outputs] == [one.token_ids for one in plain]
    assert report.prefill_budget == LEAST
    assert min(report.held_back_steps) > 0
    assert f"prefill budget {LEAST} tokens" in str(report)
    sampling: dict[int, int] = defaultdict(int)
    for rank in flights:
        for step in rank.steps:
            sampling[step.step_id] += step.num_sampling
    prefills = [
        (after.prefill_rows, sampling[before.step_id])
        for rank in flights
        for before, after in pairwise(rank.steps)
    ]
    assert {rows for rows, waiting in prefills if waiting} >= {0, LEAST}
    assert max(rows for rows, waiting in prefills if waiting) == LEAST
    assert max(rows for rows, waiting in prefills if not waiting) > LEAST, "nobody waits"


def test_a_target_that_is_always_met_holds_nothing_back_once_that_is_known() -> None:
    with budgeted(0, ALWAYS_MS) as engine:
        engine.generate(PROMPTS, GREEDY)
        before = engine.report()
        engine.generate(PROMPTS, GREEDY)
        after = engine.report()
    assert before.prefill_budget == after.prefill_budget == TOKENS
    assert before.held_back_steps == after.held_back_steps


class Clock:
    """Time that passes when it is looked at, a little, and when somebody sleeps."""

    def __init__(self) -> None:
        self._now, self._lock = 0.0, threading.Lock()

    def __call__(self) -> float:
        self.sleep(1e-6)
        return self._now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self._now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("dp_runtime.core.device_copy.perf_counter", clock)
    monkeypatch.setattr("dp_runtime.runner.step_timer.perf_counter", clock)
    monkeypatch.setattr("dp_runtime.runner.fault_injection.sleep", clock.sleep)
    return clock


class Watched:
    """Notes what a rank agrees on, by step id: the load of the step, and the budget of the next."""

    def __init__(self, loop: StepLoop) -> None:
        self.seen: dict[int, tuple[StepLoad, int | None]] = {}
        self._coordinator, self._policy = loop.coordinator, loop.coordinator.budget
        loop.coordinator.budget = self

    def __call__(self, load: StepLoad) -> int | None:
        budget = self._policy(load)
        self.seen[self._coordinator.step_id] = load, budget
        return budget


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_slow_steps_shrink_the_budget_and_each_is_known_for_what_it_is(
    num_steps: int, overlap: bool, clock: Clock
) -> None:
    """Rank 1 is slow from a step on: all ranks hear of each step's time, and take less prompt.

    It draws tokens, so with drafts it has committed a step sooner than rank 0, which runs ahead.
    """
    first = 12
    slow = ";".join(f"rank=1,step={n},kind=slow,seconds=0.05" for n in range(first, 200))
    prompts = [TokensPrompt(random_prompt(90, f"slow {n}")) for n in range(16)]
    with budgeted(num_steps, 10.0, overlap=overlap, inject=slow) as engine:
        seen = [Watched(loop).seen for loop in loops_of(engine)]
        params = [replace(GREEDY, temperature=0.5 * (n % 2)) for n in range(16)]
        engine.generate(prompts, params, [n % 2 for n in range(16)])
        report, steps = engine.report(), engine.step_trace()
    assert seen[0] == seen[1]
    budgets = [budget for _, budget in seen[0].values() if budget is not None]
    assert max(budgets) == TOKENS
    assert report.prefill_budget == budgets[-1] == LEAST
    lag = 1 + overlap
    ran = {step.step_id for step in steps}
    for step_id, (load, _) in seen[0].items():
        if step_id - lag in ran:
            assert (load.step_us >= 50_000) == (step_id - lag >= first)
