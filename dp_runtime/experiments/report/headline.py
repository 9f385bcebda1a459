"""The first things to know of a run, or of a grid, in numbers and in sentences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dp_runtime.experiments.report.charts.bars import said
from dp_runtime.experiments.report.charts.markup import Html, tag
from dp_runtime.experiments.report.charts.scale import percent, short
from dp_runtime.experiments.report.comparison import INSEPARABLE, ONCE, SAME, Change
from dp_runtime.experiments.report.source import RunData, Source
from dp_runtime.experiments.report.step_table import StepTable
from dp_runtime.experiments.report.words import FIGURES

TILES = (
    "output_tok_s", "goodput_requests_s", "ttft_ms_p50", "ttft_ms_p99", "tpot_ms_p50",
    "tpot_ms_p99", "step_ms_p50", "padding_waste", "row_balance",
)  # fmt: skip
SHARES = ("padding_waste", "good_share", "prefix_hit_rate")


def tiles(run: RunData) -> Html:
    """Lay out the main figures of a run."""
    found = [(FIGURES[name], name, run.figures.get(name)) for name in TILES]
    cells = [
        tag("div", tag("dt", words.title), tag("dd", *_value(name, value, words.unit)))
        for words, name, value in found
        if value is not None
    ]
    return tag("dl", *cells, class_="tiles")


def _value(name: str, value: float, unit: str) -> tuple[str, Html]:
    if name in SHARES:
        return percent(value), tag("small", "")
    return short(value), tag("small", "" if name == "row_balance" else f" {unit}")


def run_sentences(run: RunData, table: StepTable) -> Iterator[str]:
    """Say what the ranks did with their time."""
    ranks = table.dp_ranks
    yield f"{len(ranks)} rank{'s' * (len(ranks) > 1)}, {table.num_steps:,} steps."
    took = np.nansum(table.busy_s + table.wait_s)
    waited, found = np.nansum(table.wait_s), table.waited_for().sum(axis=0)
    if took and found.sum():
        worst = int(found.argmax())
        yield (
            f"Ranks waited {percent(waited / took)} of their time for slower ones, longest for "
            f"rank {ranks[worst]}: {percent(found[worst] / found.sum())} of the waits for others."
        )
    gathered, real = np.nansum(table.gathered), np.nansum(table.real)
    if gathered:
        yield f"{percent(1 - real / gathered)} of the rows that MoE layers were given was padding."
    idle = [str(rank) for rank, rows in zip(ranks, table.real.T) if not np.nansum(rows)]
    if idle:
        yield f"Without any row of its own: rank {', '.join(idle)}."
    if run.requests:
        failed = sum(bool(request.error) for request in run.requests)
        lost = f", {failed} of which failed" if failed else ""
        yield f"{len(run.requests):,} requests{lost}."
    else:
        yield "A trace has no requests, so there are no latencies of requests."


def grid_sentences(source: Source) -> Iterator[str]:
    """Name the point with most tokens a second, and whether it is the best beyond chance."""
    runs = max(found["requests"].count for found in source.summary.values())
    failed = f" {source.failed} runs failed." if source.failed else ""
    yield f"{len(source.summary)} points, each run up to {runs} times.{failed}"
    speeds = {
        point: f["output_tok_s"] for point, f in source.summary.items() if "output_tok_s" in f
    }
    best, *others = sorted(speeds, key=lambda point: speeds[point].mean, reverse=True)
    yield f"Most output tokens a second: {best}, {said(speeds[best])}."
    low = speeds[best].low
    alike = [p for p in others if low is None or (speeds[p].high or speeds[p].mean) >= low]
    if low is None:
        yield "Points were run once: repeats would tell differences from chance."
    elif alike:
        who = ", ".join(alike) if len(alike) < 4 else f"{len(alike)} other points"
        yield f"Its interval overlaps with those of {who}: such a difference may be chance."
    elif others:
        yield "No other point's interval reaches its own."


def change_sentences(found: list[Change]) -> Iterator[str]:
    """Count what has become better or worse beyond chance."""
    clear = [each for each in found if each.reading in ("better", "worse")]
    for reading in ("better", "worse"):
        names = dict.fromkeys(FIGURES[e.figure].title for e in clear if e.reading == reading)
        if names:
            yield f"{reading.capitalize()} beyond chance: {'; '.join(names)}."
    other = {each.reading for each in found} - {SAME}
    if not other:
        yield "Every figure is the same."
    elif not clear:
        if other == {ONCE}:
            yield "One run of each: only repeats would tell differences from chance."
        else:
            yield f"All intervals overlap: each difference {INSEPARABLE}."
