"""Page: the sections of a report, and the file that holds them with their style and script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from dp_runtime.errors import not_allowed
from dp_runtime.experiments.report.charts.bars import said
from dp_runtime.experiments.report.charts.figure import Figure
from dp_runtime.experiments.report.charts.markup import Html, joined, tag
from dp_runtime.experiments.report.comparison import (
    SAME,
    Change,
    changed_settings,
    changes,
    grid_figures,
)
from dp_runtime.experiments.report.headline import (
    change_sentences,
    grid_sentences,
    run_sentences,
    tiles,
)
from dp_runtime.experiments.report.run_figures import LEAST_BINS, run_figures
from dp_runtime.experiments.report.source import RunData, Source
from dp_runtime.experiments.report.step_table import StepTable
from dp_runtime.experiments.report.words import FIGURES

CELLS = 6000  # bins of all ranks and runs: they bound the size of the page
MOST_RUNS = 12


def write_report(path: Path, output: Path | None = None, against: Path | None = None) -> Path:
    """Write one HTML file of an experiment's results, of one of its runs, or of a trace.

    output: else report.html in the directory, or beside the trace. Raises ValueError for what no
    report can be made of, and for another run that nothing can be compared with.
    """
    default = path / "report.html" if path.is_dir() else path.with_suffix(".html")
    target = default if output is None else output
    text = report_page(Source.read(path), None if against is None else Source.read(against))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise not_allowed("output", str(target), f"a file ({error.strerror})") from None
    return target


def report_page(source: Source, other: Source | None = None) -> str:
    """Make the page; it asks nothing of a network."""
    data: dict[str, Any] = {"title": source.title, "charts": {}, "figures": {}}
    first = source.load(0)
    table = StepTable.of(first.steps)
    parts = [_heading(source, first, table)]
    if other is not None:
        parts.append(_changes(source, other, data))
    if len(source.runs) > 1:
        drawn = _figures("grid", grid_figures(source.summary, source.noise), data, "small figures")
        parts.append(_section("The points beside each other", drawn))
    parts += [*_runs(source, first, table, data), _facts(source)]
    template = Template(_asset("page.html"))
    return template.substitute(
        title=tag("title", source.title), style=_asset("style.css"), script=_asset("hover.js"),
        body=joined(*parts), data=json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )  # fmt: skip


def _asset(name: str) -> str:
    return (
        files("dp_runtime.experiments.report")
        .joinpath("page_files", name)
        .read_text(encoding="utf-8")
    )


def _heading(source: Source, first: RunData, table: StepTable) -> Html:
    """Begin with what matters most: of a grid the best point, of one run its main figures."""
    title = tag("h1", source.title), tag("p", "dp_runtime report", class_="kind")
    if len(source.runs) > 1:
        return tag("header", *title, _sentences(grid_sentences(source)))
    return tag("header", *title, _main_figures(first, table))


def _main_figures(run: RunData, table: StepTable) -> Html:
    return joined(tiles(run), _sentences(run_sentences(run, table)))


def _sentences(texts: Iterable[str]) -> Html:
    return joined(*(tag("p", text) for text in texts))


def _section(title: str, *parts: Html, **attributes: object) -> Html:
    return tag("section", tag("h2", title), *parts, **attributes)


def _figures(where: str, found: Iterable[Figure], data: dict[str, Any], kind: str) -> Html:
    drawn = []
    for number, figure in enumerate(found):
        name = f"{where}-{number}"
        data["charts"][name] = {"title": figure.title, **figure.data}
        drawn.append(figure.html(name))
    return tag("div", *drawn, class_=kind)


def _runs(source: Source, first: RunData, table: StepTable, data: dict[str, Any]) -> Iterator[Html]:
    """Draw the first run of each point, of as many points as the page has room for."""
    room = max(1, min(MOST_RUNS, CELLS // (LEAST_BINS * len(table.dp_ranks))))
    count = min(room, len(source.runs))
    if len(source.runs) > 1:
        yield _choice(list(source.summary)[:count], len(source.runs))
    cells, alone = CELLS // count, len(source.runs) == 1
    yield _run(first, table, 0, cells, data, alone)
    for number in range(1, count):
        run = source.load(number)
        yield _run(run, StepTable.of(run.steps), number, cells, data, alone)


def _choice(labels: list[str], total: int) -> Html:
    options = [tag("option", label, value=f"run-{at}") for at, label in enumerate(labels)]
    left = total - len(labels)
    more = (
        f" {left} more points are not shown here: `report` of a directory in runs/ draws one."
        if left
        else ""
    )
    text = tag("p", f"The first run of a point, step by step.{more}")
    label = tag("label", "Point: ", tag("select", *options, id="run"))
    return tag("section", tag("h2", "One run in detail"), text, label, class_="choice")


def _run(
    run: RunData, table: StepTable, number: int, cells: int, data: dict[str, Any], alone: bool
) -> Html:
    data["figures"][run.label] = run.figures
    drawn = _figures(f"run-{number}", run_figures(run, table, cells), data, "figures")
    if alone:
        return _section("What the ranks did", drawn, class_="run")
    return _section(run.label, _main_figures(run, table), drawn, id=f"run-{number}", class_="run")


def _changes(source: Source, other: Source, data: dict[str, Any]) -> Html:
    found, settings = changes(source, other), changed_settings(source, other)
    data["changes"] = [
        {"point": each.point, "figure": each.figure, "before": each.before.mean,
         "after": each.after.mean, "reading": each.reading}
        for each in found
    ]  # fmt: skip
    yes = [(name, str(before), str(after)) for name, before, after in settings]
    parts = [_table(("setting", "before", "after"), yes)] if yes else []
    several = len({each.point for each in found}) > 1
    names = ("point", "figure", "unit", "before", "after", "change", "reading")
    rows = [_change_row(each)[not several :] for each in found if each.reading != SAME]
    if rows:
        parts.append(_table(names[not several :], rows))
    title = f"What changed against {other.title}"
    return _section(title, _sentences(change_sentences(found)), *parts)


def _change_row(each: Change) -> tuple[str, ...]:
    words, relative = FIGURES[each.figure], each.relative
    change = "" if relative is None else f"{100 * relative:+.1f} %"
    return (
        each.point, words.title, words.unit, said(each.before), said(each.after), change,
        each.reading,
    )  # fmt: skip


def _table(names: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Html:
    head = tag("tr", *(tag("th", name, scope="col", data_name=name) for name in names))
    body = [
        tag("tr", *(tag("td", cell, data_name=name) for name, cell in zip(names, row)),
            class_=row[-1].replace(" ", "-"))
        for row in rows
    ]  # fmt: skip
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="wide")


def _facts(source: Source) -> Html:
    """Fold away on what machine and with what settings it was run."""
    parts = []
    for machine in source.machines:
        rows = [(name, _text(value)) for name, value in machine.items() if value]
        parts.append(_table(("machine", ""), rows))
    for point, settings in list(source.settings.items())[:1]:
        rows = [(name, _text(value)) for name, value in settings.items() if value is not None]
        parts.append(tag("h3", f"Settings of {point}"))
        parts.append(_table(("setting", "value"), rows))
    if not parts:
        return Html("")
    summary = tag("summary", "Machine and settings")
    return tag("section", tag("details", summary, *parts))


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
