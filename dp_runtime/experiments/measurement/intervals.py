"""Means of repeats with their confidence intervals, and the noise between repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev

# Student's t, 97.5 %, by degrees of freedom; NIST/SEMATECH e-Handbook, 1.3.6.7.2.
T_975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % confidence interval, which one value alone does not have."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Take values of independent runs as normally distributed."""
        mean, count = fmean(values), len(values)
        if count < 2:
            return cls(mean, None, None, count)
        half = T_975[min(count - 2, len(T_975) - 1)] * stdev(values) / sqrt(count)
        return cls(mean, mean - half, mean + half, count)


def noise_floor(points: Sequence[Sequence[float]]) -> float | None:
    """Pool the relative standard deviation of repeats; None where no point has two values."""
    squares, freedom = 0.0, 0
    for values in points:
        if len(values) > 1 and fmean(values):
            squares += (len(values) - 1) * (stdev(values) / fmean(values)) ** 2
            freedom += len(values) - 1
    return sqrt(squares / freedom) if freedom else None
