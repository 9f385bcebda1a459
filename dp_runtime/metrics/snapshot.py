"""What is known of a running engine at one time."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.status import RankHealth
from dp_runtime.metrics.totals import Totals


@dataclass(frozen=True)
class RankMetrics:
    """What a rank answers when it is asked how it is and what it has done."""

    health: RankHealth
    totals: Totals


@dataclass(frozen=True)
class RankSnapshot:
    answered: bool  # in time; else the rest is as it was when the rank last answered
    health: RankHealth
    totals: Totals
    requests: RequestTotals

    @property
    def dp_rank(self) -> int:
        return self.totals.dp_rank
