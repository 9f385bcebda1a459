"""The figures of one run: rows, padding, waits, pages and latencies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dp_runtime.experiments.measurement.request_record import RequestRecord, answered
from dp_runtime.experiments.report.bins import Bins, Float64
from dp_runtime.experiments.report.charts.bars import bars
from dp_runtime.experiments.report.charts.figure import Figure
from dp_runtime.experiments.report.charts.histogram import histogram
from dp_runtime.experiments.report.charts.time_chart import (
    FILLED,
    UNIT_HEIGHT,
    Height,
    Series,
    Strip,
    time_chart,
)
from dp_runtime.experiments.report.source import RunData
from dp_runtime.experiments.report.step_table import StepTable
from dp_runtime.experiments.report.words import LATENCIES

MOST_BINS, LEAST_BINS = 240, 60
SPIKY = 10  # largest over median rows


def run_figures(run: RunData, table: StepTable, cells: int) -> Iterator[Figure]:
    """Draw a run; cells: bins of all ranks together, at least 60 for each rank."""
    most = int(np.clip(cells // len(table.dp_ranks), LEAST_BINS, MOST_BINS))
    bins = Bins.over(table.at_s, table.duration_s, most)
    yield _rows(table, bins)
    yield _shares(table, bins)
    yield _waits(table, bins)
    yield _busy(table)
    yield _waited_for(table)
    if not np.isnan(table.free_pages).all():
        yield _free(table, bins)
    if np.nanmax(table.queries) > 0:
        yield _cached(table, bins)
    if np.nanmax(table.hits) > 0:
        yield _hits(table, bins)
    yield from _latencies(run)
    took = (table.busy_s + table.wait_s)[~np.isnan(table.busy_s)]
    text = "How long a rank was in a step, waits included:"
    yield histogram("Time of a step", text, "steps of a rank", took * 1e3)


def _ranks(table: StepTable) -> list[str]:
    return [f"rank {rank}" for rank in table.dp_ranks]


def _rows(table: StepTable, bins: Bins) -> Figure:
    strips = [
        Strip(
            name,
            (
                Series("real rows", "blue", bins.band(table.real[:, at]), FILLED),
                Series("gathered rows, padding included", "orange", bins.band(gathered), ("line",)),
            ),
        )
        for at, (name, gathered) in enumerate(zip(_ranks(table), table.gathered.T))
    ]
    text = (
        "Tokens that a rank had in a step, and what its MoE layers were given. The gap between "
        "both is padding; pale areas reach from the least to the most of the steps at that time."
    )
    height = replace(Height.of(strips), logarithmic=_is_spiky(table.gathered))
    if height.logarithmic:
        text += " The scale is logarithmic: some steps have many times the rows of others."
    return time_chart("Rows of each rank", text, "rows in a step", bins.span_s, strips, height)


def _is_spiky(rows: Float64) -> bool:
    """Tell whether prompts are so large beside decodes that a linear scale would hide these."""
    some = rows[rows > 0]
    return bool(len(some)) and float(some.max()) > SPIKY * float(np.median(some))


def _shares(table: StepTable, bins: Bins) -> Figure:
    strips = [
        Strip("padding waste", (Series("share of padding", "orange", bins.band(*table.waste())),)),
        Strip("row balance", (Series("balance", "green", bins.band(*table.balance())),)),
    ]
    text = (
        "Padding waste is the share of gathered rows that are padding: 0 is best. Row balance is a "
        "rank's mean rows over those of the largest rank: 1 is best."
    )
    return time_chart(
        "Padding waste and row balance", text, "share, 0 to 1", bins.span_s, strips, UNIT_HEIGHT
    )


def _waits(table: StepTable, bins: Bins) -> Figure:
    took = table.busy_s + table.wait_s
    share = np.divide(table.wait_s, took, out=np.full(took.shape, np.nan), where=took > 0)
    strips = [
        Strip(name, (Series("waiting", "red", bins.band(part, np.nan_to_num(all_)), FILLED),))
        for name, part, all_ in zip(_ranks(table), share.T, took.T)
    ]
    text = (
        "The share of its steps that a rank waited for slower ones, in agreements and collectives."
    )
    return time_chart(
        "Waiting of each rank", text, "share of time, 0 to 1", bins.span_s, strips, UNIT_HEIGHT
    )


def _busy(table: StepTable) -> Figure:
    busy, wait = np.nansum(table.busy_s, axis=0), np.nansum(table.wait_s, axis=0)
    rows = {
        name: {"blue": float(busy[at]), "red": float(wait[at])}
        for at, name in enumerate(_ranks(table))
    }
    text = "Where the time of each rank's steps went."
    legend = {"blue": "busy", "red": "waiting"}
    return bars("Busy and waiting", text, "seconds", rows, legend)


def _waited_for(table: StepTable) -> Figure:
    found = table.waited_for().sum(axis=0)
    rows = {name: {"red": float(found[at])} for at, name in enumerate(_ranks(table))}
    text = (
        "Seconds of other ranks, added up, in steps where this rank waited least: it was the one "
        "that they waited for."
    )
    return bars("Who was waited for", text, "seconds of other ranks", rows, {"red": "waited for"})


def _free(table: StepTable, bins: Bins) -> Figure:
    text = (
        "KV pages of each rank that requests could have, cached ones that nobody holds among them. "
        "Where there are none, requests wait or are preempted."
    )
    return _pages(table, bins, "Free pages", text, ("free pages", "blue"), table.free_pages)


def _cached(table: StepTable, bins: Bins) -> Figure:
    text, title = "KV pages of each rank that its prefix cache holds.", "Pages in the prefix cache"
    return _pages(table, bins, title, text, ("cached pages", "green"), table.cached_pages)


def _pages(
    table: StepTable, bins: Bins, title: str, text: str, kind: tuple[str, str], pages: Float64
) -> Figure:
    strips = [
        Strip(name, (Series(*kind, bins.band(of_rank), FILLED),))
        for name, of_rank in zip(_ranks(table), pages.T)
    ]
    return time_chart(title, text, "pages", bins.span_s, strips, Height.of(strips))


def _hits(table: StepTable, bins: Bins) -> Figure:
    share = np.divide(
        table.hits, table.queries, out=np.full(table.hits.shape, np.nan), where=table.queries > 0
    )
    strips = [
        Strip(name, (Series("found", "blue", bins.band(part), FILLED),))
        for name, part in zip(_ranks(table), share.T)
    ]
    text = "Prompt tokens that were found in the prefix cache, of all since the rank's start."
    return time_chart(
        "Hits of the prefix cache", text, "share of tokens", bins.span_s, strips, UNIT_HEIGHT
    )


def _latencies(run: RunData) -> Iterator[Figure]:
    for name, (title, text, counted) in LATENCIES.items():
        values_ms = latencies_ms(answered(run.requests), name)
        if len(values_ms):
            limit_ms = getattr(run.slo, f"{name}_ms", None)
            yield histogram(title, text, counted, values_ms, limit_ms)


def latencies_ms(requests: Sequence[RequestRecord], name: str) -> Float64:
    """Collect one kind of latency; requests of one token have some of them not."""
    parts = [np.atleast_1d(getattr(request, f"{name}_s")) for request in requests]
    values = np.concatenate(parts) * 1e3 if parts else np.zeros(0)
    return np.asarray(values[~np.isnan(values)], np.float64)
