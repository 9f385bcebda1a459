"""Totals and the report."""

import pytest

from dp_runtime.core.request import FinishReason
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.totals import Recorder, Totals
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace


def step(rank: int, step_id: int, real: tuple[int, ...], gathered: tuple[int, ...]) -> StepTrace:
    one = PassTrace(
        "target", real, gathered, sum(gathered) * 2, forward_s=0.5, wait_s=0.2, mode="eager"
    )
    return StepTrace(
        rank, step_id, 0, 10.0 + step_id, schedule_s=0.01, agree_s=0.02, agree_wait_s=0.06,
        prepare_s=0.03,
        sample_s=0.04, commit_s=0.05, passes=(one,),
        output_tokens=real[rank], prompt_tokens=1,
    )  # fmt: skip


def recorders(steps: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[Recorder]:
    ranks = [Recorder(rank) for rank in range(len(steps[0][0]))]
    for number, (real, gathered) in enumerate(steps):
        for rank, recorder in enumerate(ranks):
            recorder.add(step(rank, number, real, gathered))
    return ranks


def test_the_report_follows_its_definitions() -> None:
    ranks = recorders([((10, 12, 12, 12), (12,) * 4), ((0, 12, 1, 0), (12,) * 4)])
    ended = {FinishReason.LENGTH: 5, FinishReason.ABORT: 1}
    requests = [
        RequestTotals(0, ended=ended, moved=3, expected_cached_tokens=30, cached_tokens=20),
        RequestTotals(1, ended={FinishReason.STOP: 1}, expected_cached_tokens=5),
    ]
    report = Report.from_totals([rank.totals for rank in ranks], requests, elapsed_s=2.0)
    assert (report.requests, report.moved) == (7, 3)
    assert "routing expected in prefix caches 35, found there 20" in str(report)
    assert report.padding_waste == pytest.approx(1 - 59 / 96)
    assert report.row_balance == pytest.approx((59 / 4) / 24)
    assert report.wire_rows == 96 * 2
    assert report.idle_steps == (1, 0, 0, 1)
    assert report.output_tokens == 59
    assert report.tokens_per_s == pytest.approx(29.5)
    assert report.busy_s[0] == pytest.approx(2 * (0.01 + 0.02 + 0.03 + 0.3 + 0.04 + 0.05))
    assert report.wait_s[0] == pytest.approx(2 * (0.2 + 0.06))
    assert "padding_waste 0.385" in str(report)


def test_the_report_tells_what_was_found_in_prefix_caches() -> None:
    counts = PrefixCounts(200, 50, evictions=3), PrefixCounts(100, 100, evictions=1)
    totals = [Totals(rank, prefixes=each) for rank, each in enumerate(counts)]
    text = str(Report.from_totals(totals, [], elapsed_s=0.0))
    found = "tokens found in the prefix cache 150 of 300   share by rank  0.250  1.000"
    assert f"{found}   pages evicted 4" in text.splitlines()
    assert "prefix" not in str(Report.from_totals([Totals(0)], [], elapsed_s=0.0))


def test_no_step_no_waste() -> None:
    report = Report.from_totals([Totals(0), Totals(1)], [], elapsed_s=0.0)
    assert (report.padding_waste, report.row_balance, report.tokens_per_s) == (0.0, 1.0, 0.0)
