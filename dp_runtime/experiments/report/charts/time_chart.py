"""Values over time: a strip for each rank or figure, all above one axis of seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dp_runtime.experiments.report.bins import Band, Float64
from dp_runtime.experiments.report.charts.figure import Figure
from dp_runtime.experiments.report.charts.markup import Html, joined, tag
from dp_runtime.experiments.report.charts.scale import Scale, axis, short, top

AXIS = "seconds since the first step"
FILLED = ("band", "area", "line")


@dataclass(frozen=True)
class Series:
    name: str
    colour: str  # a class of the page's style
    band: Band
    drawn: tuple[str, ...] = ("band", "line")  # of band, area, line


@dataclass(frozen=True)
class Strip:
    label: str
    series: tuple[Series, ...]


@dataclass(frozen=True)
class Height:
    """The scale of a strip, from 0 to its end."""

    end: float
    logarithmic: bool = False

    @classmethod
    def of(cls, strips: Sequence[Strip]) -> Height:
        return cls(top(max(each.band.highest for strip in strips for each in strip.series)))

    def share(self, values: Float64) -> Float64:
        shares = np.log1p(values) / np.log1p(self.end) if self.logarithmic else values / self.end
        return np.asarray(shares, np.float64)

    @property
    def lines(self) -> list[float]:
        tens = [10.0**power for power in range(1, 9) if 10**power < 0.15 * self.end]
        return [*(tens if self.logarithmic else []), self.end]

    def grid(self, width: int) -> list[Html]:
        places = 100 - 100 * self.share(np.array(self.lines))
        return [tag("path", d=f"M0 {place:.1f}H{width}", class_="grid") for place in places]

    def labels(self) -> list[Html]:
        places = 100 - 100 * self.share(np.array(self.lines))
        return [
            tag("span", short(value), class_="end", style=f"top:{place:.1f}%")
            for value, place in zip(self.lines, places)
        ]


UNIT_HEIGHT = Height(1.0)


def time_chart(
    title: str, text: str, unit: str, span_s: float, strips: Sequence[Strip], height: Height
) -> Figure:
    """Draw strips of one scale."""
    rows = [_row(strip, height, unit, slim=len(strips) > 16) for strip in strips]
    last = tag("div", tag("div", class_="name"), axis(Scale(0.0, span_s), AXIS), class_="row")
    legend = {each.colour: each.name for strip in strips for each in strip.series}
    return Figure(title, text, unit, joined(*rows, last), legend, _data(unit, span_s, strips))


def _row(strip: Strip, height: Height, unit: str, slim: bool) -> Html:
    num_bins = len(strip.series[0].band.mean)
    drawn = [shape for series in strip.series for shape in _shapes(series, height)]
    said = f"{strip.label}: {', '.join(each.name for each in strip.series)}, {unit}"
    svg = tag(
        "svg", *height.grid(num_bins), *drawn, viewBox=f"0 0 {num_bins} 100",
        preserveAspectRatio="none", role="img", aria_label=said,
    )  # fmt: skip
    plot = tag("div", svg, *height.labels(), class_="plot slim" if slim else "plot")
    return tag("div", tag("div", strip.label, class_="name"), plot, class_="row")


def _shapes(series: Series, height: Height) -> list[Html]:
    """Draw the range of each bin behind the line of its means."""
    low, mean, high = (
        100 - 100 * height.share(values)
        for values in (series.band.low, series.band.mean, series.band.high)
    )  # from above
    floor = np.full(len(mean), 100.0)
    paths = {"band": _area(low, high), "area": _area(floor, mean), "line": _line(mean)}
    return [tag("path", d=paths[kind], class_=f"{kind} {series.colour}") for kind in series.drawn]


def _line(values: Float64) -> str:
    return "".join(
        f"M{start} {values[start]:.1f}" + _steps(values, start, end) for start, end in _runs(values)
    )


def _area(low: Float64, high: Float64) -> str:
    parts = []
    for start, end in _runs(high):
        back = "".join(f"V{low[at]:.1f}H{at}" for at in range(end - 1, start - 1, -1))
        parts.append(f"M{start} {high[start]:.1f}{_steps(high, start, end)}{back}Z")
    return "".join(parts)


def _steps(values: Float64, start: int, end: int) -> str:
    return "".join(f"V{values[at]:.1f}H{at + 1}" for at in range(start, end))


def _runs(values: Float64) -> list[tuple[int, int]]:
    """Find the stretches of bins that have values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], ~np.isnan(values), [0]])))
    return [(int(start), int(end)) for start, end in zip(edges[::2], edges[1::2])]


def _data(unit: str, span_s: float, strips: Sequence[Strip]) -> dict[str, Any]:
    return {
        "kind": "time",
        "unit": unit,
        "span_s": span_s,
        "strips": [
            {
                "label": strip.label,
                "series": [{"name": each.name, **each.band.lists()} for each in strip.series],
            }
            for strip in strips
        ],
    }
