"""How often a value was how large, with percentiles and limits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from dp_runtime.experiments.report.bins import Float64
from dp_runtime.experiments.report.charts.figure import Figure
from dp_runtime.experiments.report.charts.markup import Html, joined, tag
from dp_runtime.experiments.report.charts.scale import Scale, axis, percent, short, top

MOST_BINS = 48
PERCENTILES = (50, 90, 99)


def histogram(
    title: str, text: str, counted: str, values_ms: Float64, limit_ms: float | None = None
) -> Figure:
    """Draw at least one value, in milliseconds; limit_ms: what a request must keep."""
    marks = {f"p{each}": float(np.percentile(values_ms, each)) for each in PERCENTILES}
    scale = Scale(0.0, top(1.05 * max(float(values_ms.max()), limit_ms or 0.0)))
    num_bins = int(np.clip(4 * np.sqrt(len(values_ms)), 8, MOST_BINS))
    counts, edges = np.histogram(values_ms, num_bins, (scale.low, scale.high))
    rows = tag(
        "div", tag("div", f"number of {counted}", class_="name"),
        _plot(title, counts.tolist(), marks, scale, limit_ms), class_="row",
    )  # fmt: skip
    last = tag("div", tag("div", class_="name"), axis(scale, "milliseconds"), class_="row")
    said = ", ".join(f"{name} {short(value)} ms" for name, value in marks.items())
    kept = float((values_ms <= limit_ms).mean()) if limit_ms else None
    within = (
        "" if kept is None else f" {percent(kept)} are within the SLO of {short(limit_ms or 0)} ms."
    )
    data = {
        "kind": "histogram", "unit": "ms", "counted": counted, "edges": edges.tolist(),
        "counts": counts.tolist(), "marks": marks, "limit_ms": limit_ms, "within": kept,
    }  # fmt: skip
    legend = {"blue": counted, "mark": "percentiles"} | ({"limit": "SLO"} if limit_ms else {})
    return Figure(title, f"{text} {said}.{within}", "ms", joined(rows, last), legend, data)


def _plot(
    title: str, counts: list[int], marks: Mapping[str, float], scale: Scale, limit_ms: float | None
) -> Html:
    most = top(max(counts))
    bars = [
        tag("rect", x=at, y=f"{100 - 100 * count / most:.2f}", width=0.9,
            height=f"{100 * count / most:.2f}", class_="bar blue")
        for at, count in enumerate(counts) if count
    ]  # fmt: skip
    svg = tag(
        "svg", *bars, viewBox=f"0 0 {len(counts)} 100", preserveAspectRatio="none", role="img",
        aria_label=f"histogram: {title}, milliseconds",
    )  # fmt: skip
    lines = [_mark(name, scale.percent(value), "mark") for name, value in marks.items()]
    if limit_ms:
        lines.append(_mark("SLO", scale.percent(limit_ms), "limit"))
    return tag(
        "div",
        svg,
        *lines,
        tag("span", short(most), class_="end", style="top:0%"),
        class_="plot tall",
    )


def _mark(name: str, left: float, kind: str) -> Html:
    """Draw a line with its name, which lies to the left of it near the right end."""
    side = " left" if left > 85 else ""
    return tag(
        "div", tag("span", name), class_=f"{kind} {name.lower()}{side}", style=f"left:{left}%"
    )
