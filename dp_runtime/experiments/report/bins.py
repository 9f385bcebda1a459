"""Steps put into bins of time, so that a page has as much to draw whatever a run's length."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
DIGITS = 4  # of numbers in the page's data


@dataclass(frozen=True, eq=False)
class Band:
    """What the steps of each bin had; nan where a bin has none."""

    low: Float64  # [bins]
    mean: Float64
    high: Float64

    @property
    def highest(self) -> float:
        known = self.high[~np.isnan(self.high)]
        return float(known.max()) if len(known) else 0.0

    def lists(self) -> dict[str, list[float | None]]:
        return {name: numbers(values) for name, values in vars(self).items()}


@dataclass(frozen=True, eq=False)
class Bins:
    """Which steps are in which bin; a long step is also in those that no other began in."""

    span_s: float
    count: int
    step: Int64  # [pairs]
    bin: Int64  # [pairs]

    @classmethod
    def over(cls, at_s: Float64, duration_s: Float64, most: int) -> Bins:
        """Split the time of steps, which are sorted by it."""
        span_s = max(float((at_s + duration_s).max()), 1e-9)
        count = min(most, len(at_s))
        place = np.minimum((at_s / span_s * count).astype(np.int64), count - 1)
        empty = np.setdiff1d(np.arange(count), place)
        begin_s = empty * span_s / count
        before = np.searchsorted(at_s, begin_s) - 1
        lasts = at_s[before] + duration_s[before] > begin_s
        step = np.concatenate([np.arange(len(at_s)), before[lasts]])
        return cls(span_s, count, step, np.concatenate([place, empty[lasts]]))

    def band(self, values: Float64, weights: Float64 | None = None) -> Band:
        """Sum up values of steps, nan where there is none; the mean is weighted."""
        value = values[self.step]
        known = ~np.isnan(value)
        place, value = self.bin[known], value[known]
        weight = np.ones(len(value)) if weights is None else weights[self.step][known]
        low, high = np.full(self.count, np.nan), np.full(self.count, np.nan)
        np.fmin.at(low, place, value)
        np.fmax.at(high, place, value)
        total = np.bincount(place, weight * value, self.count)
        with np.errstate(invalid="ignore"):
            mean = total / np.bincount(place, weight, self.count)
        return Band(low, np.where(np.isnan(low), np.nan, mean), high)


def numbers(values: Float64) -> list[float | None]:
    return [None if np.isnan(value) else float(f"{value:.{DIGITS}g}") for value in values]
