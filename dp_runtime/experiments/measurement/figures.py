"""The figures of a run, from its requests and from its steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dp_runtime.experiments.measurement.columns import PERCENTILES
from dp_runtime.experiments.measurement.request_record import RequestRecord, answered
from dp_runtime.experiments.slo import Slo
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace

Figures = dict[str, float | None]


def figures_of(records: Sequence[RequestRecord], steps: Sequence[StepTrace], slo: Slo) -> Figures:
    """Sum up a run; a figure is None where nothing has it, as the latency of no answer."""
    done = answered(records)
    duration_s = max((record.arrivals[-1][0] for record in done), default=0.0)
    return {
        "duration_s": duration_s,
        "requests": len(records),
        "failed_requests": len(records) - len(done),
        "prompt_tokens": sum(record.prompt_tokens for record in records),
        "output_tokens": sum(record.output_tokens for record in records),
        "output_tok_s": _rate(sum(record.output_tokens for record in done), duration_s),
        "requests_s": _rate(len(done), duration_s),
        **_latencies(done),
        "late_ms_p99": _percentile([each.submitted_s - each.planned_s for each in records], 99),
        **_goodput(records, duration_s, slo),
        **_step_figures(steps),
        **_rank_figures(steps, done),
    }


def _latencies(done: Sequence[RequestRecord]) -> Figures:
    itl = [record.itl_s for record in done]
    seconds: dict[str, Sequence[float] | NDArray[np.float64]] = {
        "ttft": [record.ttft_s for record in done],
        "tpot": [record.tpot_s for record in done],
        "itl": np.concatenate(itl) if itl else [],
        "e2e": [record.e2e_s for record in done],
    }
    return {
        f"{name}_ms_p{percent}": _percentile(values, percent)
        for name, values in seconds.items()
        for percent in PERCENTILES
    }


def _goodput(records: Sequence[RequestRecord], duration_s: float, slo: Slo) -> Figures:
    good = sum(slo.kept_by(record) for record in records)
    share = good / len(records) if records else None
    return {"good_share": share, "goodput_requests_s": _rate(good, duration_s)}


def _step_figures(steps: Sequence[StepTrace]) -> Figures:
    report = report_of(steps)
    epochs = {step.epoch for step in steps}
    step_s = [step.busy_s + step.wait_s for step in steps]
    return {
        "steps": len({(step.epoch, step.step_id) for step in steps}),
        "step_ms_p50": _percentile(step_s, 50),
        "step_ms_p99": _percentile(step_s, 99),
        "padding_waste": report.padding_waste,
        "row_balance": report.row_balance,
        "wire_rows": report.wire_rows,
        "preemptions": report.preemptions,
        "prefix_hit_rate": sum(rank.hits for rank in report.prefixes)
        / max(sum(rank.queries for rank in report.prefixes), 1),
        "drafts_proposed": report.drafts_proposed,
        "tokens_per_verification": report.tokens_per_verification or None,
        "recoveries": len(epochs) - 1,
        "recovery_s": max((_gap_s(steps, epoch) for epoch in epochs - {min(epochs)}), default=None),
    }


def _rank_figures(steps: Sequence[StepTrace], done: Sequence[RequestRecord]) -> Figures:
    report, requests = report_of(steps), Counter(record.dp_rank for record in done)
    figures: Figures = {}
    for at, rank in enumerate(report.dp_ranks):
        figures[f"busy_s_{rank}"] = report.busy_s[at]
        figures[f"wait_s_{rank}"] = report.wait_s[at]
        figures[f"output_tokens_{rank}"] = report.output_tokens_by_rank[at]
        figures[f"requests_{rank}"] = requests[rank]
    return figures


def report_of(steps: Sequence[StepTrace]) -> Report:
    """Sum up some steps as an engine sums up all that it has had."""
    ranks: dict[int, Totals] = {}
    for step in sorted(steps, key=lambda each: each.dp_rank):
        ranks.setdefault(step.dp_rank, Totals(step.dp_rank)).add(step)
    assert ranks, "a run has steps"
    return Report.from_totals(list(ranks.values()), [], 0.0)


def _gap_s(steps: Sequence[StepTrace], epoch: int) -> float:
    """Seconds from the last step before an epoch that a rank still knows to its first."""
    before = max(end_s(step) for step in steps if step.epoch < epoch)
    return min(step.start_s for step in steps if step.epoch == epoch) - before


def end_s(step: StepTrace) -> float:
    return step.start_s + step.busy_s + step.wait_s


def _percentile(seconds: Sequence[float] | NDArray[np.float64], percent: int) -> float | None:
    values = np.asarray(seconds, np.float64) * 1e3
    values = values[~np.isnan(values)]
    return float(np.percentile(values, percent)) if len(values) else None


def _rate(count: float, duration_s: float) -> float | None:
    return count / duration_s if duration_s else None
