"""The dashboard for Grafana asks for what the page has, and says what it shows."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from dp_runtime.metrics.prometheus.page import metrics_page
from tests.dp_runtime.cli.top.pages import rank_after

DASHBOARD = json.loads(Path("examples/grafana/dp_runtime.json").read_text())
PANELS: list[dict[str, Any]] = [each for each in DASHBOARD["panels"] if each["type"] != "row"]
NAME = re.compile(r"\b(?:dp_runtime_|vllm:)\w+")
BY = re.compile(r"\bby \(([^)]*)\)")
every_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])


@pytest.fixture(scope="module")
def labels_of() -> dict[str, set[str]]:
    """The names of labels of every sample's name."""
    page = metrics_page([rank_after(0, 3), rank_after(1, 3)], "tiny").decode()
    samples = [sample for family in parse(page) for sample in family.samples]
    return {sample.name: {*sample.labels, "instance", "job"} for sample in samples}


@every_panel
def test_what_a_panel_asks_for_is_exported(
    panel: dict[str, Any], labels_of: dict[str, set[str]]
) -> None:
    for target in panel["targets"]:
        names = NAME.findall(target["expr"])
        assert names
        assert set(names) <= labels_of.keys()
        shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        grouped = {each.strip() for by in BY.findall(target["expr"]) for each in by.split(",")}
        assert shown | grouped <= set.union(*(labels_of[name] for name in names))
        if grouped:
            assert shown <= grouped, "the others are summed away"


@every_panel
def test_a_panel_has_a_title_a_unit_and_legends(panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["title"]
    assert defaults["unit"] in ("short", "s", "percentunit", "reqps")
    assert defaults["custom"]["axisLabel"]
    assert all(target["legendFormat"] for target in panel["targets"])


def test_variables_are_of_labels_that_are_exported(labels_of: dict[str, set[str]]) -> None:
    queries = [each["query"] for each in DASHBOARD["templating"]["list"] if each["type"] == "query"]
    for query in (each["query"] for each in queries):
        (name,) = NAME.findall(query)
        label = query.rstrip(")").rsplit(", ", 1)[1]
        assert label in labels_of[name]


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        width = 24 if "repeat" in panel else place["w"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(width) for y in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
