"""A value for each of some names: as bars from zero, or as points with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from dp_runtime.experiments.measurement.intervals import Interval
from dp_runtime.experiments.report.charts.figure import Figure
from dp_runtime.experiments.report.charts.markup import Html, joined, tag
from dp_runtime.experiments.report.charts.scale import Scale, axis, short, top

Parts = Mapping[str, float]  # of a bar, by their colours


def bars(
    title: str, text: str, unit: str, rows: Mapping[str, Parts], legend: Mapping[str, str]
) -> Figure:
    """Draw a bar for each name, of one part after the other."""
    scale = Scale(0.0, top(max(sum(parts.values()) for parts in rows.values())))
    drawn = [_bar(name, parts, scale, legend) for name, parts in rows.items()]
    data = {
        "kind": "bars", "unit": unit,
        "rows": {name: {legend[c]: v for c, v in parts.items()} for name, parts in rows.items()},
    }  # fmt: skip
    return Figure(title, text, unit, joined(*drawn, _axis(scale, unit)), legend, data)


def _bar(name: str, parts: Parts, scale: Scale, legend: Mapping[str, str]) -> Html:
    blocks = [
        tag("i", class_=colour, style=f"width:{scale.percent(value)}%", title=legend[colour])
        for colour, value in parts.items()
    ]
    values = " + ".join(short(value) for value in parts.values())
    return _row(name, tag("div", *blocks, class_="track stack"), values)


def intervals(title: str, text: str, unit: str, rows: Sequence[tuple[str, Interval]]) -> Figure:
    """Draw means, and their 95 % confidence intervals where there are some."""
    ends = [v for _, i in rows for v in (i.mean, i.low, i.high) if v is not None]
    least = min(interval.mean for _, interval in rows)
    if least >= 0:  # of what is never negative, nor is the scale
        ends = [max(end, 0.0) for end in ends]
    scale = Scale.around(ends)
    drawn = [_point(name, interval, scale) for name, interval in rows]
    data = {"kind": "intervals", "unit": unit, "rows": [[n, asdict(i)] for n, i in rows]}
    return Figure(title, text, unit, joined(*drawn, _axis(scale, unit)), data=data)


def _point(name: str, interval: Interval, scale: Scale) -> Html:
    parts = [tag("b", style=f"left:{scale.percent(interval.mean)}%")]
    if interval.low is not None and interval.high is not None:
        left, right = (scale.percent(max(v, scale.low)) for v in (interval.low, interval.high))
        parts.insert(0, tag("s", style=f"left:{left}%;width:{right - left:.2f}%"))
    return _row(name, tag("div", *parts, class_="track"), said(interval))


def said(interval: Interval) -> str:
    """Write a mean with half of its interval."""
    if interval.high is None:
        return short(interval.mean)
    half = float(f"{interval.high - interval.mean:.2g}")
    return f"{short(interval.mean)} \u00b1 {short(half)}"


def _row(name: str, track: Html, value: str) -> Html:
    return tag(
        "div", tag("div", name, class_="name"), track, tag("div", value, class_="value"),
        class_="row valued",
    )  # fmt: skip


def _axis(scale: Scale, unit: str) -> Html:
    space = tag("div", class_="name"), tag("div", class_="value")
    return tag("div", space[0], axis(scale, unit, most=3), space[1], class_="row valued")
