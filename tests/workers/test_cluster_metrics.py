"""What a rank tells Ray's metrics, which a recorder stands for here; test_ray.py asks Ray."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest

from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Totals
from workers.ray_cluster.cluster_metrics import ClusterMetrics

Series = tuple[str, frozenset[tuple[str, str]]]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> dict[Series, list[float]]:
    """All that was set or added, by name and tags."""
    calls: dict[Series, list[float]] = defaultdict(list)

    class Recorder:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
            assert ":" not in name
            self.name, self.tag_keys = name, set(tag_keys)

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == self.tag_keys
            calls[self.name, frozenset(tags.items())].append(value)

        inc = set

    for kind in ("Counter", "Gauge"):
        monkeypatch.setattr(f"ray.util.metrics.{kind}", Recorder)
    return calls


def rank(steps: int, running: int) -> RankSnapshot:
    health = RankHealth(0, RankState.RUNNING, num_running=running)
    totals = Totals(0, steps=steps)
    totals.step_s.add(0.02, steps)
    return RankSnapshot(True, health, totals, RequestTotals(0))


def test_counters_rise_gauges_are_set_and_buckets_are_gauges(
    told: dict[Series, list[float]],
) -> None:
    metrics = ClusterMetrics("tiny")
    for steps, running in ((3, 5), (3, 4), (10, 0), (2, 1)):  # the last after it joined anew
        metrics.export(rank(steps, running))
    own = ("dp_rank", "0")
    assert told["dp_runtime_steps_total", frozenset({own})] == [3, 7, 2]
    assert told["dp_runtime_requests_running", frozenset({own})] == [5, 4, 0, 1]
    assert told["dp_runtime_step_seconds_bucket", frozenset({own, ("le", "0.02")})] == [3, 3, 10, 2]
    alias = frozenset({own, ("engine", "0"), ("model_name", "tiny")})
    assert told["vllm_num_requests_running", alias] == [5, 4, 0, 1]


def test_series_of_one_counter_rise_apart(told: dict[Series, list[float]]) -> None:
    metrics, one = ClusterMetrics("tiny"), rank(1, 0)
    for waits in ({1: 0.5}, {1: 0.75, 2: 1.0}):
        metrics.export(replace(one, totals=replace(one.totals, wait_for_s=waits)))
    name, own = "dp_runtime_wait_seconds_total", ("dp_rank", "0")
    assert told[name, frozenset({own, ("slowest_rank", "1")})] == [0.5, 0.25]
    assert told[name, frozenset({own, ("slowest_rank", "2")})] == [1.0]
