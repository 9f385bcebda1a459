"""EngineMetrics: what the driver counts, and what it sums up with what ranks have counted."""

from __future__ import annotations

from dp_runtime.engine.rank_group import RankGroup
from dp_runtime.metrics.busy_clock import BusyClock
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankSnapshot


class EngineMetrics:
    def __init__(self, group: RankGroup) -> None:
        self._group = group
        self._requests: dict[int, RequestTotals] = {}  # by dp_rank, also of ranks that have left
        self.clock = BusyClock()

    def of(self, dp_rank: int) -> RequestTotals:
        return self._requests.setdefault(dp_rank, RequestTotals(dp_rank))

    def report(self) -> Report:
        requests = list(self._requests.values())
        return Report.from_totals(self._group.totals(), requests, self.clock.elapsed_s)

    def snapshots(self, timeout_s: float) -> tuple[RankSnapshot, ...]:
        return tuple(
            RankSnapshot(answered, rank.health, rank.totals, self.of(rank.totals.dp_rank).copied())
            for rank, answered in self._group.metrics.read(timeout_s)
        )

    def export(self) -> None:
        totals = map(self.of, self._group.members.dp_ranks)
        self._group.metrics.export({rank.dp_rank: rank.copied() for rank in totals})
