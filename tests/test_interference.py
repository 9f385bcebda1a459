"""What examples/benchmarks/prefill_interference.py reads off a run, and how it drives one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import SERVING_PROGRAMS, Pass
from dp_runtime.metrics.totals import Recorder
from dp_runtime.metrics.trace import PassTrace, StepTrace
from dp_runtime.sampling.sampler import SampledTokens, Sampler
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from examples.benchmarks.interference import (
    Decoder,
    Driver,
    Gap,
    Prefiller,
    SeenStep,
    SeparateScheduler,
    View,
    scheduling,
)

PROGRAM = SERVING_PROGRAMS[0]


def view(*steps: tuple[int, dict[int, int]]) -> View:
    """Of a rank with requests 7 and 8, a step a second: prefill rows and the tokens it gave."""
    seen = (SeenStep(float(at), rows, tokens, 0.5) for at, (rows, tokens) in enumerate(steps))
    return View(1, (7, 8), tuple(seen))


def test_a_step_with_prefill_counts_only_if_every_request_got_a_token() -> None:
    both, one = {7: 1, 8: 3}, {7: 1, 8: 0}
    assert view((0, {}), (5, both), (5, both), (0, one)).emitting_share() == 1
    assert view((0, both), (5, both), (5, one), (5, {7: 1}), (5, {})).emitting_share() == 0.25


def test_gaps_are_those_between_emissions_with_prefill_in_between() -> None:
    one = {7: 2}
    seen = view((0, one), (0, one), (5, one), (5, {}), (5, {8: 1}), (0, one), (0, one), (5, {}))
    assert seen.gaps_with_prefill() == [Gap(2.0, 1.0), Gap(5.0, 3.0)]
    assert seen.prefill_step_s() == [1.0, 1.0]


def request(number: int, prompt: int, outputs: int) -> RankRequest:
    params = SamplingParams(max_tokens=outputs)
    return RankRequest(number, tuple(range(1, prompt + 1)), params, 0, frozenset())


def test_separate_steps_prefill_once_all_know_and_decode_once_nobody_prefills() -> None:
    scheduler = SeparateScheduler(PageGeometry(9, 4), Limits(2, 4, 20))
    scheduler.add(request(1, 6, 3))
    assert (scheduler.schedule(PROGRAM).real_rows, scheduler.queued_tokens) == ((0,), 6)
    scheduler.prefill_agreed = True
    first = scheduler.schedule(PROGRAM)
    assert (first.real_rows, scheduler.queued_tokens) == ((4,), 2)
    scheduler.commit(first, SampledTokens((), ()))
    second = scheduler.schedule(PROGRAM)
    assert (second.real_rows, scheduler.queued_tokens) == ((2,), 0)
    scheduler.commit(second, SampledTokens((5,), (None,)))
    assert scheduler.schedule(PROGRAM).real_rows == (0,)  # another rank still prefills
    scheduler.prefill_agreed = False
    assert scheduler.schedule(PROGRAM).real_rows == (1,)


@pytest.mark.parametrize("separate", [False, True])
def test_a_scheduler_of_other_chunks_keeps_the_states_of_the_ranks_requests(separate: bool) -> None:
    sampler, limits = Sampler(50, 4, torch.device("cpu")), Limits(2, 16, 20)
    loop: Any = SimpleNamespace(scheduler=Scheduler(PageGeometry(9, 4), limits, [sampler]))
    loop.coordinator = SimpleNamespace(agree=None)
    with scheduling(loop, 4, separate):
        scheduler = loop.scheduler
        scheduler.add(request(1, 6, 3))
        scheduler.prefill_agreed = True
        assert scheduler.schedule(PROGRAM).real_rows == (4,)
        assert len(sampler) == 1
        scheduler.abort(1)
    assert loop.scheduler.limits == limits


@pytest.fixture
def recorder() -> Recorder:
    return Recorder(1)


def step(recorder: Recorder, rows: tuple[int, ...], *driven: tuple[Driver, dict[int, int]]) -> None:
    passes = (
        PassTrace(Pass.DRAFT, (9,) * len(rows), (9,) * len(rows), 0, 0.0, 0.0, "eager"),
        PassTrace(Pass.TARGET, rows, rows, 0, 0.0, 0.0, "eager"),
    )
    number = recorder.totals.steps
    recorder.add(StepTrace(1, number, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, passes, 0, 0))
    for driver, tokens in driven:
        driver.deliver([RequestUpdate(i, 0, (1,) * count) for i, count in tokens.items()])


def test_prompts_come_after_the_hold_and_one_after_another(recorder: Recorder) -> None:
    prompts = [request(number, 6, 1) for number in (1, 2)]
    driver = Prefiller(list(prompts), recorder, hold=2, pause=1)
    given = []
    for tokens in ({}, {}, {}, {1: 1}, {}, {}):
        given.append(driver.take().add)
        driver.deliver([])  # what the loop says of commands: no step
        step(recorder, (4, 1), (driver, tokens))
    assert given == [(), (), prompts[:1], (), (), prompts[1:]]
    assert [seen.prefill_rows for seen in driver.seen] == [4] * 6
    assert len(driver.first_token_s) == 1


def test_decoders_end_the_run_after_the_last_row_of_prefill(recorder: Recorder) -> None:
    driver = Decoder([request(7, 2, 99)], recorder, prefill_rows=6, after=1)
    taken = []
    for rows in (0, 4, 2, 0, 0):
        taken.append(driver.take())
        step(recorder, (rows, 1), (driver, {7: 1}))
    assert [len(commands.add) for commands in taken] == [1, 0, 0, 0, 0]
    assert [list(commands.abort) for commands in taken] == [[], [], [], [], [7]]
    ends = []
    for _ in range(2):  # the last step of the loop above was in flight
        ends.append(driver.take().stop)
        driver.deliver([])
    assert ends == [False, True]
