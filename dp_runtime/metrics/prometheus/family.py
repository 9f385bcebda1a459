"""Family: one metric of all ranks, and how to read it from what is known of a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client.core import Metric
from prometheus_client.samples import Sample

from dp_runtime.metrics.histogram import Histogram
from dp_runtime.metrics.snapshot import RankSnapshot

Labels = dict[str, str]
ByLabel = Mapping[tuple[str, ...], float]  # by the values of Family.labels


@dataclass(frozen=True)
class Family:
    kind: Literal["gauge", "counter", "histogram"]
    name: str  # of a counter without `_total`
    help: str
    read: Callable[[RankSnapshot], float | ByLabel | Histogram]
    labels: tuple[str, ...] = ()

    def metric(self, ranks: Iterable[tuple[Labels, RankSnapshot]]) -> Metric:
        """Return the samples of all ranks, which are given with labels of their own."""
        metric = Metric(self.name, self.help, self.kind)
        for own, rank in ranks:
            for suffix, values, number in self._samples(rank):
                metric.samples.append(Sample(self.name + suffix, own | values, number))
        return metric

    def _samples(self, rank: RankSnapshot) -> Iterator[tuple[str, Labels, float]]:
        suffix = "_total" if self.kind == "counter" else ""
        match self.read(rank):
            case Histogram() as histogram:
                yield from _buckets(histogram)
            case Mapping() as numbers:
                for values, number in numbers.items():
                    yield suffix, dict(zip(self.labels, values, strict=True)), number
            case number:
                yield suffix, {}, number


def _buckets(histogram: Histogram) -> Iterator[tuple[str, Labels, float]]:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    for bound, count in zip(bounds, accumulate(histogram.counts), strict=True):
        yield "_bucket", {"le": bound}, count
    yield "_count", {}, histogram.count
    yield "_sum", {}, histogram.sum
