"""A report says what its run has, in figures that can be read, and asks nothing of a network."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp_runtime.experiments import write_report
from dp_runtime.experiments.measurement.request_record import answered
from dp_runtime.experiments.report.page import report_page
from dp_runtime.experiments.report.source import RunData, Source
from dp_runtime.experiments.results.run_files import read_json, write_json
from dp_runtime.experiments.slo import Slo
from dp_runtime.metrics.trace import PassTrace, StepTrace
from tests.dp_runtime.experiments.report.pages import Page
from tests.dp_runtime.experiments.report.runs import make_requests, make_steps, write_results

POINTS = [{"engine.padding": "max_len"}, {"engine.padding": "ragged"}]


def page_of(path: Path, against: Path | None = None) -> Page:
    return Page(write_report(path, against=against).read_text(encoding="utf-8"))


def page_of_steps(steps: list[StepTrace]) -> Page:
    run = RunData("a run", steps, (), Slo(), {})
    return Page(report_page(Source("a run", (lambda: run,), {"a run": {}})))


def charts(page: Page, title: str) -> list[dict[str, Any]]:
    return [chart for chart in page.data["charts"].values() if chart["title"] == title]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_results(tmp_path_factory.mktemp("laboratory") / "grid", POINTS)


def test_the_figures_of_runs_are_in_the_page(grid: Path) -> None:
    page = page_of(grid)
    rows = [read_json(grid / "runs" / f"key{number}-0" / "row.json") for number in (0, 1)]
    for row, label in zip(rows, ("padding max_len", "padding ragged")):
        shown = page.data["figures"][label]
        assert shown == {
            name: row[name] for name in row if name not in ("point", "repeat", "error")
        }
    (speed,) = charts(page, "Output tokens a second")
    values = [
        [read_json(grid / "runs" / f"key{n}-{r}" / "row.json")["output_tok_s"] for r in (0, 1)]
        for n in (0, 1)
    ]
    found = [(name, i["mean"], i["count"]) for name, i in speed["rows"]]
    means = [float(np.mean(each)) for each in values]
    assert found == [
        ("padding max_len", pytest.approx(means[0]), 2),
        ("padding ragged", pytest.approx(means[1]), 2),
    ]
    assert "Most output tokens a second: padding max_len" in page.root.text


def test_histograms_count_every_request_and_know_the_slo(grid: Path) -> None:
    page = page_of(grid / "runs" / "key0-1")
    (ttft,) = charts(page, "Time to the first token (TTFT)")
    requests = answered(make_requests(9, 1.01))
    assert sum(ttft["counts"]) == len(requests)
    within = np.mean([request.ttft_s <= 0.015 for request in requests])
    assert (ttft["limit_ms"], ttft["within"]) == (15.0, pytest.approx(within))
    assert len(page.root.all("div", class_="limit")) == 1
    (itl,) = charts(page, "Gap between tokens (ITL)")
    assert sum(itl["counts"]) == sum(len(each.itl_s) for each in requests)


def test_rows_and_waits_are_those_of_the_steps() -> None:
    steps = make_steps(30)
    page = page_of_steps(steps)
    (rows,) = charts(page, "Rows of each rank")
    for rank, strip in enumerate(rows["strips"]):
        real, gathered = strip["series"]
        binned: dict[int, list[PassTrace]] = defaultdict(list)
        for step in steps:
            if step.dp_rank == rank:
                binned[place_of(step, rows)].append(step.passes[0])
        assert len(binned) > 10
        for place, found in binned.items():
            values = [one.real_rows[rank] for one in found]
            assert real["mean"][place] == pytest.approx(np.mean(values), rel=1e-3)
            assert (real["low"][place], real["high"][place]) == (min(values), max(values))
            assert gathered["high"][place] == max(one.gathered_rows[rank] for one in found)
    (free,) = charts(page, "Free pages")
    known = [value for strip in free["strips"] for value in strip["series"][0]["high"] if value]
    assert (max(known), min(known)) == (9, 3)
    (waited,) = charts(page, "Who was waited for")
    total = sum(part["waited for"] for part in waited["rows"].values())
    assert total == pytest.approx(sum(step.wait_s for step in steps))
    assert "Without any row of its own: rank 1." in page.root.text


def place_of(step: StepTrace, chart: dict[str, Any]) -> int:
    """Return the bin that a step begins in."""
    count = len(chart["strips"][0]["series"][0]["mean"])
    return int((step.start_s - 100) / chart["span_s"] * count)


def test_every_figure_has_a_title_a_unit_and_labels(grid: Path) -> None:
    page = page_of(grid)
    figures = page.root.all("figure")
    assert len(figures) == len(page.data["charts"]) > 20
    for figure in figures:
        (title,) = figure.all("h3")
        assert title.text
        unit = figure.attributes["data-unit"]
        assert unit
        (axis,) = figure.all("div", class_="unit")
        said = [axis.text, *(svg.attributes["aria-label"] or "" for svg in figure.all("svg"))]
        assert any(unit in text.replace("milliseconds", "ms") for text in said), title.text
        assert any(
            mark.text for tick in figure.all("div", class_="ticks") for mark in tick.all("span")
        )
        names = [name.text for name in figure.all("div", class_="name")]
        assert any(names)
        assert sum(not name for name in names) == 1, "only the axis has no name"


def test_nothing_is_asked_of_a_network(grid: Path) -> None:
    text = write_report(grid).read_text(encoding="utf-8")
    assert "http" not in text
    page = Page(text).root
    for name in ("link", "img", "iframe", "a"):
        assert page.all(name) == []
    assert "@import" not in text
    assert "url(" not in text
    assert all("src" not in script.attributes for script in page.all("script"))


HOSTILE = "</script><img src=x onerror=alert(1)>&\"'$body"


def test_names_can_not_become_markup(tmp_path: Path) -> None:
    points: list[dict[str, Any]] = [
        {"engine.padding": HOSTILE},
        {"engine.padding": "ragged", HOSTILE: 1},
    ]
    grid = write_results(tmp_path / "grid", points, repeats=1)
    described = read_json(grid / "run.json")
    machines = [{HOSTILE: HOSTILE, "versions": {HOSTILE: HOSTILE}}]
    write_json(grid / "run.json", described | {"name": HOSTILE, "machines": machines})
    page = page_of(grid, against=grid)
    assert page.root.all("img") == []
    assert page.data["title"] == HOSTILE
    assert page.root.all("h1")[0].text == HOSTILE
    assert len(page.root.all("script")) == 2


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_run_of_one_step_has_all_its_figures(num_steps: int) -> None:
    page = page_of_steps(make_steps(num_steps))
    assert {len(each.all("div", class_="unit")) for each in page.root.all("figure")} == {1}


def test_a_run_without_a_row_and_without_time_is_drawn() -> None:
    def idle(step: StepTrace) -> StepTrace:
        one = replace(
            step.passes[0], real_rows=(0, 0), gathered_rows=(0, 0), forward_s=0.0, wait_s=0.0
        )
        still: dict[str, Any] = dict.fromkeys(
            ("schedule_s", "agree_s", "prepare_s", "sample_s", "commit_s"), 0.0
        )
        return replace(step, passes=(one,), start_s=5.0, **still)

    page = page_of_steps([idle(step) for step in make_steps(3)])
    assert "Without any row of its own: rank 0, 1." in page.root.text
    page = page_of_steps([replace(step, passes=()) for step in make_steps(3)])
    assert "NaN" not in json.dumps(page.data)


def test_a_rank_that_was_lost_leaves_a_gap() -> None:
    steps = [step for step in make_steps(40) if step.dp_rank == 0 or step.step_id < 20]
    (rows,) = charts(page_of_steps(steps), "Rows of each rank")
    last = place_of(next(step for step in steps if step.step_id == 20), rows)
    mean = rows["strips"][1]["series"][0]["mean"]
    assert set(mean[:last]) == {0.0}
    assert set(mean[last + 1 :]) == {None}


def test_many_steps_become_bins_that_keep_every_extreme() -> None:
    steps = make_steps(600, dp_size=4)
    high = replace(steps[4].passes[0], real_rows=(99, 0, 0, 0), gathered_rows=(99,) * 4)
    steps[4] = replace(steps[4], passes=(high,))
    text = report_page(
        Source("many", (lambda: RunData("many", steps, (), Slo(), {}),), {"many": {}})
    )
    assert len(text) < 1_000_000
    (rows,) = charts(Page(text), "Rows of each rank")
    series = rows["strips"][0]["series"][0]
    assert len(series["mean"]) == 240
    assert max(series["high"]) == 99
    assert all(
        low <= mean <= high
        for low, mean, high in zip(series["low"], series["mean"], series["high"])
    )


def test_large_grids_show_as_many_runs_as_fit(tmp_path: Path) -> None:
    points = [{"engine.seed": number} for number in range(14)]
    page = page_of(write_results(tmp_path / "grid", points, repeats=1))
    assert len(page.root.all("section", class_="run")) == 12
    assert "2 more points are not shown here" in page.root.text
