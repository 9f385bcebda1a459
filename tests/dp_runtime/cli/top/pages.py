"""Pages that a server could have answered with, from made-up numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from dp_runtime.cli.top.scrape import Scrape
from dp_runtime.metrics.health_report import HealthReport
from dp_runtime.metrics.prometheus.page import metrics_page
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace

DP_SIZE = 2


def rank_after(dp_rank: int, steps: int, answered: bool = True) -> RankSnapshot:
    """A rank that has run so many steps of 20 ms; rank 0 waits 5 ms of each for rank 1."""
    totals, requests = Totals(dp_rank), RequestTotals(dp_rank)
    wait_s = 0.005 if dp_rank == 0 else 0.0
    for number in range(steps):
        one = PassTrace("target", (2, 6), (8, 8), 0, 0.014, wait_s, "eager")
        step = StepTrace(
            dp_rank, number, 0, 0.0, schedule_s=0.001, agree_s=0.001, agree_wait_s=0.0,
            prepare_s=0.001, sample_s=0.001, commit_s=0.002, passes=(one,),
            output_tokens=2 + dp_rank, prompt_tokens=1, num_preemptions=dp_rank * 4,
            num_drafts=2, accepted=(1, 0, 1),
            prefixes=PrefixCounts(queries=100 + 8 * number, hits=50 + 3 * number),
        )  # fmt: skip
        totals.add(step)
        totals.add_wait(1, wait_s)
        requests.add_tokens(0.3, 1, first=True)
        requests.add_tokens(0.02, 1, first=False)
    health = RankHealth(
        dp_rank, RankState.RUNNING, last_step=steps - 1, last_step_age_s=0.01, free_pages=75,
        num_pages=101, num_running=3, num_queued=dp_rank,
    )  # fmt: skip
    return RankSnapshot(answered, health, totals, requests)


def scrape(at: float, *ranks: RankSnapshot, error: str = "", num_standbys: int = 0) -> Scrape:
    healths = [replace(rank.health, error=error) for rank in ranks]
    health = json.dumps({"status": "ok", "ranks": HealthReport.of(healths).ranks})
    parsed = Scrape.parsed(metrics_page(ranks, "tiny", num_standbys).decode(), health)
    return replace(parsed, at=at)


def after(at: float, steps: int, **how: Any) -> Scrape:
    return scrape(at, *(rank_after(rank, steps) for rank in range(DP_SIZE)), **how)
