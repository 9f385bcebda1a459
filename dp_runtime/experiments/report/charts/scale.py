"""Axes with round numbers, and numbers as people read them."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from dp_runtime.experiments.report.charts.markup import Html, tag

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """A linear axis of values; positions are percents of its length."""

    low: float
    high: float

    @classmethod
    def around(cls, values: list[float]) -> Scale:
        """Hold all values with room at both ends, and zero if it is not far away."""
        low, high = min(values), max(values)
        if low >= 0 and low < 0.4 * high:
            return cls(0.0, high * 1.06)
        room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(low - room, high + room)

    def percent(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 2)

    def ticks(self, most: int = 4) -> list[float]:
        step = _round_step((self.high - self.low) / most)
        first, last = ceil(self.low / step - 1e-9), floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def axis(scale: Scale, title: str, most: int = 4) -> Html:
    """Lay out the numbers below a plot, and what they count in what unit."""
    marks = [
        tag("span", short(value), style=f"left:{scale.percent(value)}%")
        for value in scale.ticks(most)
    ]
    return tag("div", tag("div", *marks, class_="ticks"), tag("div", title, class_="unit"))


def short(value: float) -> str:
    """Write three or four digits of a number."""
    if not isfinite(value):
        return "none"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"
    return f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def top(value: float) -> float:
    """Return the end of an axis from 0 that holds a value."""
    if value <= 0:
        return 1.0
    step = _round_step(value / 4)
    return ceil(value / step - 1e-9) * step


def _round_step(least: float) -> float:
    size = 10.0 ** floor(log10(least))
    return next(step * size for step in STEPS if step * size >= least * (1 - 1e-9))
