"""Figures of a run, against sums done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from dp_runtime.experiments.measurement.columns import COLUMNS, RANK_COLUMNS, columns_page, unit_of
from dp_runtime.experiments.measurement.figures import figures_of
from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.experiments.slo import Slo
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace

RECORDS = [
    RequestRecord(0, 0, 0, 10, 0.0, 0.001, ((0.101, 1), (0.201, 2), (0.401, 1))),
    RequestRecord(1, 0, 1, 20, 1.0, 1.0, ((2.0, 1),)),
    RequestRecord(2, 0, -1, 5, 1.5, 1.5, (), "lost"),
]


def step(rank: int, number: int, epoch: int = 0, start_s: float = 0.0) -> StepTrace:
    target = PassTrace("target", (3, 1), (3, 3), 6, 0.04, 0.01 * rank, "eager")
    return StepTrace(
        rank, number, epoch, start_s, schedule_s=0.002, agree_s=0.001, agree_wait_s=0.02,
        prepare_s=0.001, sample_s=0.001, commit_s=0.001, passes=(target,), output_tokens=2,
        prompt_tokens=0, num_drafts=2, accepted=(1, 0, 1), prefixes=PrefixCounts(10, 4 * rank),
    )  # fmt: skip


STEPS = [step(0, 4), step(1, 4), step(0, 0, 1, 0.566), step(1, 0, 1, 0.566)]


def test_figures_are_those_of_the_requests_and_steps() -> None:
    found = figures_of(RECORDS, STEPS, Slo(ttft_ms=500.0))
    expected = {
        "duration_s": 2.0, "requests": 3, "failed_requests": 1, "prompt_tokens": 35,
        "output_tokens": 5, "output_tok_s": 2.5, "requests_s": 1.0, "ttft_ms_p50": 550.0,
        "tpot_ms_p50": 100.0, "itl_ms_p50": 50.0, "itl_ms_p99": 197.0, "e2e_ms_p50": 700.0,
        "good_share": 1 / 3, "goodput_requests_s": 0.5, "steps": 2, "step_ms_p50": 66.0,
        "padding_waste": 1 - 8 / 12, "row_balance": 8 / 12, "wire_rows": 12,
        "drafts_proposed": 16, "prefix_hit_rate": 0.2,
        "tokens_per_verification": 2.0, "recoveries": 1, "recovery_s": 0.5, "busy_s_1": 0.072,
        "wait_s_1": 0.06, "output_tokens_0": 4, "requests_0": 1, "requests_1": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_every_figure_is_a_documented_column() -> None:
    known = {column.name for column in COLUMNS}
    of_ranks = {f"{column.name}_{rank}" for column in RANK_COLUMNS for rank in (0, 1)}
    assert set(figures_of(RECORDS, STEPS, Slo())) == known | of_ranks
    assert unit_of("busy_s_1") == "s"
    assert unit_of("ttft_ms_p99") == "ms"


@pytest.mark.parametrize(
    ("slo", "share"),
    [(Slo(), 2 / 3), (Slo(tpot_ms=99.0), 1 / 3), (Slo(e2e_ms=350.0), 0), (Slo(ttft_ms=1.0), 0)],
)
def test_goodput_counts_requests_that_kept_every_limit(slo: Slo, share: float) -> None:
    """A request of one token has no time per token to keep."""
    assert figures_of(RECORDS, STEPS, slo)["good_share"] == pytest.approx(share)


def test_the_documented_columns_are_current() -> None:
    page = Path(__file__).parents[4] / "docs" / "experiments.md"
    assert columns_page() in page.read_text(encoding="utf-8")
