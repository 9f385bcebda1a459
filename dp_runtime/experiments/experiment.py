"""Experiment: a workload over a grid of settings, as a TOML file describes it."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dp_runtime.config import EngineConfig
from dp_runtime.core.settings import setting
from dp_runtime.errors import not_allowed, require
from dp_runtime.experiments.grid import combinations
from dp_runtime.experiments.input_paths import with_paths
from dp_runtime.experiments.point import Point, Run
from dp_runtime.experiments.scenario.scenario import Scenario
from dp_runtime.experiments.slo import Slo
from dp_runtime.experiments.tables import (
    Checked,
    Table,
    as_table,
    read_table,
    with_value,
)
from dp_runtime.experiments.workload.workload import read_workload

TABLES = ("engine", "workload", "scenario", "grid", "cases", "slo")


@dataclass(frozen=True)
class Plan(Checked):
    """How often and in which order points are run."""

    name: str = setting("experiment", "of the results' directory, where no other is given")
    repeats: int = setting(3, "runs of each point; their spread is the noise", at_least=1)
    order: str = setting(
        "random",
        "every point once before any is run again, in a new order each time or always the same",
        choices=("random", "interleaved"),
    )
    seed: int = setting(0, "of the order", at_least=0)
    warm_up_requests: int = setting(
        2, "requests on each rank before the clock starts", at_least=0, at_most=1000
    )
    time_limit_s: float = setting(600.0, "seconds of a run, then it counts as failed", above=0)


@dataclass(frozen=True)
class Experiment:
    """All points are checked when it is made: ValueError names the field by its dotted path."""

    plan: Plan
    slo: Slo
    points: tuple[Point, ...]
    document: Mapping[str, Any]

    @classmethod
    def from_file(cls, path: Path, engine: Mapping[str, Any] | None = None) -> Experiment:
        """Read a TOML file, whose paths are seen from its directory.

        engine: settings that the file may leave out.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise not_allowed("file", str(path), f"a TOML file ({error.strerror})") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not TOML: {error}") from None
        return cls.from_document({"name": path.stem} | document, path.parent, engine)

    @classmethod
    def from_document(
        cls,
        document: Mapping[str, Any],
        directory: Path | None = None,
        engine: Mapping[str, Any] | None = None,
    ) -> Experiment:
        """Read the tables of a file; paths are seen from a directory, else from this one."""
        numbers = {name: value for name, value in document.items() if name not in TABLES}
        base = {
            "engine": {**(engine or {}), **as_table(document.get("engine", {}), "engine")},
            "workload": document.get("workload", {}),
            "scenario": document.get("scenario", {}),
        }
        plan = read_table(Plan, numbers, "")
        slo = read_table(Slo, document.get("slo", {}), "slo")
        home = Path.cwd() if directory is None else directory
        points = tuple(
            _point(base, varied, values, home) for varied, values in combinations(document)
        )
        _check_routing(points)
        for point in points:
            _check_counting(plan, point.scenario)
        return cls(plan, slo, points, document)

    def runs(self) -> list[Run]:
        """List all runs in their order: a drift of the machine meets all points alike."""
        rng = np.random.default_rng(self.plan.seed)
        runs = []
        for repeat in range(self.plan.repeats):
            places = range(len(self.points))
            order = rng.permutation(len(self.points)) if self.plan.order == "random" else places
            runs += [Run(self.points[place], repeat) for place in order]
        return runs


def _point(base: Table, varied: Table, values: Table, home: Path) -> Point:
    tables: dict[str, Any] = dict(base)
    for name, value in values.items():
        tables = with_value(tables, name, value)
    tables = with_paths(tables, home)
    engine = read_table(EngineConfig, tables["engine"], "engine")
    workload, scenario = read_workload(tables["workload"]), Scenario.read(tables["scenario"])
    scenario.check_changes(engine.dp_size)
    point = Point(varied, tables, scenario.injected(engine), workload, scenario)
    ok, allowed = not (point.pinned and scenario.changes_ranks), "routed, where ranks come or go"
    require(ok, "workload.skew", "pinned", allowed)
    return point


def _check_routing(points: Sequence[Point]) -> None:
    """Let routing policies differ only where they have requests to route."""
    policies = {point.config.routing for point in points}
    ok = len(policies) == 1 or not any(point.pinned for point in points)
    require(ok, "workload.skew", "pinned", "routed, where engine.routing differs between points")


def _check_counting(plan: Plan, scenario: Scenario) -> None:
    """Let ranks count from the first step of the load."""
    ok = plan.warm_up_requests == 0 or not scenario.happens_to_ranks
    allowed = "0 with events of ranks, whose steps and seconds begin with their first step"
    require(ok, "warm_up_requests", plan.warm_up_requests, allowed)
