"""ClusterMetrics: a rank's metrics as its Ray cluster exports them."""

from __future__ import annotations

from typing import Any

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from dp_runtime.metrics.prometheus.page import metrics_of
from dp_runtime.metrics.snapshot import RankSnapshot


class ClusterMetrics:
    """Keeps Ray's metric of every name; Ray exports them from every node with the prefix `ray_`.

    Ray's own histograms take observations. Ours are counted already: each bucket is a gauge.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._by_name: dict[str, Any] = {}
        self._counted: dict[tuple[str, str], float] = {}

    def export(self, rank: RankSnapshot) -> None:
        for metric in metrics_of([rank], self._model_name):
            for sample in metric.samples:
                if metric.type == "counter":
                    self._raise(metric, sample)
                else:
                    self._set(metric, sample)

    def _raise(self, metric: Metric, sample: Sample) -> None:
        series = (sample.name, str(sample.labels))
        before = self._counted.get(series, 0.0)
        more = sample.value - before if sample.value >= before else sample.value
        if more:
            from ray.util.metrics import Counter

            self._metric(Counter, metric, sample).inc(more, sample.labels)
            self._counted[series] = sample.value

    def _set(self, metric: Metric, sample: Sample) -> None:
        from ray.util.metrics import Gauge

        self._metric(Gauge, metric, sample).set(sample.value, sample.labels)

    def _metric(self, kind: Any, metric: Metric, sample: Sample) -> Any:
        name = sample.name.replace(":", "_")  # Ray allows no colons
        if name not in self._by_name:
            self._by_name[name] = kind(name, metric.documentation, tuple(sample.labels))
        return self._by_name[name]
