"""The grid of an experiment: named cases times lists of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from dp_runtime.core.plain_values import plain_str
from dp_runtime.errors import require
from dp_runtime.experiments.tables import Table, as_table, check_names

MAX_POINTS = 10_000
CASE = "case"  # the column with the names of cases
VARIED = ("engine", "workload", "scenario")
NAMES = "a dotted name of the engine, the workload or the scenario, as engine.padding"


def combinations(document: Table) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Iterate over the cases times the grid: the columns that tell points apart, and all values."""
    axes = as_table(document.get("grid", {}), "grid")
    flat = dict(_axes(axes, ""))
    cases = _cases(document.get("cases", []))
    num_points = len(cases) or 1
    for name, values in flat.items():
        require(isinstance(values, list) and bool(values), f"grid.{name}", values, "a list")
        num_points *= len(values)
    require(num_points <= MAX_POINTS, "grid", f"{num_points} points", f"at most {MAX_POINTS}")
    for case in cases or [("", {})]:
        name, values = case
        named = {CASE: name} if name else {}
        for combination in product(*flat.values()):
            chosen = dict(zip(flat, combination))
            labels = {name: label(value) for name, value in chosen.items()}
            yield named | labels, values | chosen


def label(value: Any) -> Any:
    """Return a value as it stands in a table: a number, a text, or one made of a table."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={label(inner)}" for name, inner in value.items())
    return str(value) if isinstance(value, list) else value


def _axes(table: Table, where: str) -> Iterator[tuple[str, Any]]:
    """Find the axes, whether a file quotes their dotted names or not."""
    for name, value in table.items():
        path = f"{where}.{name}" if where else name
        if isinstance(value, Mapping):
            yield from _axes(value, path)
            continue
        head = path.partition(".")[0]
        require(head in VARIED, f"grid.{path}", value, NAMES)
        yield path, value


def _cases(value: object) -> list[tuple[str, dict[str, Any]]]:
    require(isinstance(value, list), "cases", value, "[[cases]], each with a name")
    assert isinstance(value, list), "checked above"
    cases: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(value):
        where = f"cases.{number}"
        table = dict(as_table(entry, where))
        name = plain_str(table.pop("name", None))
        ok, allowed = bool(name) and name not in cases, "a text that no other case has"
        require(ok, f"{where}.name", name, allowed)
        assert name is not None, "checked above"
        check_names(table, list(VARIED), where)
        cases[name] = dict(_leaves(table, ""))
    return list(cases.items())


def _leaves(table: Table, where: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        path = f"{where}.{name}" if where else name
        if isinstance(value, Mapping) and "kind" not in value:
            yield from _leaves(value, path)
        else:
            yield path, value
