"""MetricsCalls: asks ranks for their metrics, or to export them, and waits for none that hangs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from time import monotonic

from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankMetrics
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Totals
from workers.messages import ExportMetrics, ReadMetrics
from workers.ranks import Rank


class MetricsCalls:
    """Has at most one call of each kind open at a rank, and remembers what each last answered."""

    def __init__(self, ranks: Callable[[], Sequence[Rank]]) -> None:
        self._ranks = ranks  # that serve now
        self._known: dict[Rank, _Known] = {}
        self._exports: dict[int, Future[None]] = {}
        self._lock = threading.Lock()

    def read(self, timeout_s: float) -> tuple[tuple[RankMetrics, bool], ...]:
        """Return what each rank says, or last said, and whether it has answered in time."""
        with self._lock:
            self._known = {rank: self._known.get(rank) or _Known(rank) for rank in self._ranks()}
            questions = [known.ask() for known in self._known.values()]
            wait(questions, timeout_s)
            return tuple(known.take() for known in self._known.values())

    def export(self, requests: Mapping[int, RequestTotals]) -> None:
        """Let each rank give its cluster its metrics and these; one that still does is skipped."""
        for rank in self._ranks():
            totals = requests.get(rank.dp_rank)
            if totals is None:
                continue  # it came meanwhile
            before = self._exports.get(rank.dp_rank)
            if before is None or before.done():
                self._exports[rank.dp_rank] = rank.call(ExportMetrics(totals))


class _Known:
    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._question: Future[RankMetrics] | None = None
        self._last = RankMetrics(
            RankHealth(rank.dp_rank, RankState.UNREACHABLE), Totals(rank.dp_rank)
        )
        self._last_at = monotonic()

    def ask(self) -> Future[RankMetrics]:
        if self._question is None:
            self._question = self._rank.call(ReadMetrics())
        return self._question

    def take(self) -> tuple[RankMetrics, bool]:
        question, now = self._question, monotonic()
        assert question is not None, "asked before"
        answered = question.done() and question.exception() is None
        if question.done():
            self._question = None
        if answered:
            self._last, self._last_at = question.result(), now
        health = self._last.health
        age_s = health.last_step_age_s + now - self._last_at
        return replace(self._last, health=replace(health, last_step_age_s=age_s)), answered
