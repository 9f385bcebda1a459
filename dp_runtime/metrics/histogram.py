"""Histogram: observations counted by upper bounds, as Prometheus does."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

SECONDS = tuple(float(f"{digit}e{power}") for power in range(-4, 4) for digit in (1, 2, 3, 5))
TOKENS = tuple(float(2**power) for power in range(18))


@dataclass
class Histogram:
    """One thread adds to it; others read copies."""

    bounds: tuple[float, ...]
    counts: list[int]  # [bounds + 1]; the last one is of what is above all bounds
    sum: float = 0.0

    @classmethod
    def of(cls, bounds: tuple[float, ...]) -> Histogram:
        return cls(bounds, [0] * (len(bounds) + 1))

    @property
    def count(self) -> int:
        return sum(self.counts)

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def copied(self) -> Histogram:
        return Histogram(self.bounds, self.counts.copy(), self.sum)
