"""What the steps of a rank add up to."""

import pickle

import pytest

from dp_runtime.metrics.histogram import Histogram
from dp_runtime.metrics.totals import Recorder, Totals
from dp_runtime.metrics.trace import PassTrace, StepTrace

TARGET = PassTrace("target", (3, 5), (8, 8), 6, forward_s=0.4, wait_s=0.1, mode="graph")
DRAFT = PassTrace("draft", (0, 5), (5, 5), 2, forward_s=0.2, wait_s=0.1, mode="eager")


def step(*passes: PassTrace, accepted: tuple[int, ...] = ()) -> StepTrace:
    return StepTrace(
        0, 7, 0, 1.0, schedule_s=0.01, agree_s=0.02, agree_wait_s=0.06, prepare_s=0.03,
        sample_s=0.04, commit_s=0.05, passes=passes, output_tokens=4, prompt_tokens=9,
        num_preemptions=2, num_drafts=len(accepted) - 1 if accepted else 0, accepted=accepted,
    )  # fmt: skip


def test_steps_add_up() -> None:
    totals = Totals(0)
    for each in (step(TARGET), step(DRAFT, TARGET, accepted=(1, 0, 4))):
        totals.add(each)
    assert (totals.steps, totals.output_tokens, totals.prompt_tokens) == (2, 8, 18)
    assert totals.preemptions == 2, "each step says how many there were until then"
    assert (totals.real_rows, totals.gathered_rows, totals.max_rows) == (6, 21, 15)
    assert totals.wire_rows == 14
    assert (totals.drafts_proposed, totals.accepted) == (10, (1, 0, 4))
    assert totals.pass_modes == {("target", "graph"): 2, ("draft", "eager"): 1}
    assert totals.pass_s == pytest.approx({"target": 0.6, "draft": 0.1})
    assert totals.phase_s == pytest.approx(
        {"schedule": 0.02, "agree": 0.04, "prepare": 0.06, "sample": 0.08, "commit": 0.1}
    )
    assert totals.wait_s == pytest.approx(0.16 + 0.26)
    assert totals.busy_s == pytest.approx(0.3 + 0.7)
    assert totals.step_s.sum == pytest.approx(totals.busy_s + totals.wait_s)
    assert (totals.step_tokens.sum, totals.step_tokens.count) == (26.0, 2)


def test_steps_that_held_prompts_back_are_counted_and_the_last_budget_is_kept() -> None:
    totals = Totals(0)
    for budget, held_back in ((512, True), (700, False), (256, True)):
        totals.add_prefill_budget(budget, held_back)
    assert (totals.prefill_budget, totals.held_back_steps) == (256, 2)


@pytest.mark.parametrize(("rows", "idle"), [((0, 5), 1), ((1, 0), 0)])
def test_a_step_is_idle_without_rows_in_any_pass(rows: tuple[int, int], idle: int) -> None:
    totals = Totals(0)
    totals.add(step(DRAFT, PassTrace("target", rows, rows, 0, 0.0, 0.0, "eager")))
    assert totals.idle_steps == idle


def test_a_copy_stays_as_it_was() -> None:
    recorder = Recorder(0)
    recorder.add(step(TARGET))
    recorder.totals.add_wait(1, 0.5)
    before = recorder.totals.copied()
    survivor = pickle.loads(pickle.dumps(before))
    recorder.add(step(DRAFT))
    recorder.totals.add_wait(1, 0.5)
    recorder.totals.queue_s.add(1.0)
    assert before == survivor != recorder.totals
    assert before.wait_for_s == {1: 0.5}


def test_a_bound_counts_what_is_not_above_it() -> None:
    histogram = Histogram.of((1.0, 2.0))
    for value, times in ((0.0, 1), (1.0, 2), (1.5, 1), (2.1, 3)):
        histogram.add(value, times)
    assert (histogram.counts, histogram.count) == ([3, 1, 3], 7)
    assert histogram.sum == pytest.approx(9.8)
