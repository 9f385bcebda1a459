"""Source: what a report is made of; an experiment's results, one of its runs, or a trace."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from dp_runtime.errors import one_line, require, shown
from dp_runtime.experiments.measurement.figures import Figures, end_s, figures_of
from dp_runtime.experiments.measurement.intervals import Interval
from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.experiments.results.run_directory import RUN, RUNS
from dp_runtime.experiments.results.run_files import read_json, read_requests, read_row, read_steps
from dp_runtime.experiments.results.tables import KEYS, Row, figure_names
from dp_runtime.experiments.slo import Slo
from dp_runtime.experiments.tables import flattened
from dp_runtime.metrics.read_chrome_trace import read_chrome_trace
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.parallel.policies.policy_name import SUFFIX

Summary = Mapping[str, Mapping[str, Interval]]  # by point and figure
ALLOWED = "a directory of `experiment`, one of its runs, or a file of --trace"


@dataclass(frozen=True, eq=False)
class RunData:
    """All that is known of one run."""

    label: str
    steps: Sequence[StepTrace]
    requests: Sequence[RequestRecord]
    slo: Slo
    figures: Figures


@dataclass(frozen=True, eq=False)
class Source:
    """Runs are read one by one, as they are asked for."""

    title: str
    runs: tuple[Callable[[], RunData], ...]  # one for each point
    summary: Summary
    machines: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # flat, by point
    noise: Mapping[str, float] = field(default_factory=dict)  # by figure
    failed: int = 0

    @classmethod
    def read(cls, path: Path) -> Source:
        """Find out what a path is; ValueError if it is nothing that a report can be made of."""
        try:
            if (path / RUN).is_file():
                return _experiment(path)
            if (row := read_row(path)) is not None:
                return _single(path, row)
        except (
            OSError,
            EOFError,
            KeyError,
            TypeError,
            AttributeError,
            json.JSONDecodeError,
        ) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(one_line(f"{path}: results that can not be read: {why}")) from None
        require(path.is_file(), "report", str(path), ALLOWED)
        return _trace(path)

    def load(self, number: int) -> RunData:
        """Read a run; ValueError if its files are broken or it has no step."""
        return self.runs[number]()


DESCRIBED = {
    "name": str, "points": dict, "settings": dict, "configs": dict, "slo": dict, "machines": list,
    "noise_floor": dict,
}  # fmt: skip


def _described(path: Path) -> dict[str, Any]:
    """Read run.json; TypeError or KeyError for one that is no experiment's."""
    described: dict[str, Any] = read_json(path)
    for name, kind in DESCRIBED.items():
        if not isinstance(described[name], kind):
            raise TypeError(f"{name} is {shown(described[name])}")
    inner = [*described["points"].values(), *described["machines"]]
    floors = described["noise_floor"].values()
    if not all(isinstance(each, dict) for each in inner) or any(
        not isinstance(floor, int | float) for floor in floors
    ):
        raise TypeError("points, machines and noise_floor are tables, the last one of numbers")
    return described


def _experiment(path: Path) -> Source:
    described = _described(path / RUN)
    varied = described["points"]
    runs = [run for key in varied for run in sorted((path / RUNS).glob(f"{key}-*"))]
    rows = [row for run in runs if (row := read_row(run)) is not None]
    good = [row for row in rows if not row["error"]]
    require(bool(good), "report", str(path), "results with a run that has ended well")
    labels = labels_of(varied)
    own = {key: [row for row in good if row["point"] == key] for key in varied}
    own = {key: found for key, found in own.items() if found}
    slo = Slo(**described["slo"])
    return Source(
        title=described["name"],
        runs=tuple(
            partial(_run, path / RUNS / f"{key}-{found[0]['repeat']}", found[0], labels[key], slo)
            for key, found in own.items()
        ),
        summary={labels[key]: _intervals(found, slo) for key, found in own.items()},
        machines=described["machines"],
        settings={labels[key]: _settings(described, key) for key in own},
        noise=described["noise_floor"],
        failed=len(rows) - len(good),
    )


def _single(path: Path, row: Row) -> Source:
    """Read one run; the experiment that it is of, if it lies there, has its SLO and its point."""
    above = path.resolve().parent.parent / RUN
    require(not row["error"], "report", str(path), f"a run without an error: {row['error']}")
    described = _described(above) if above.is_file() else None
    slo = Slo(**described["slo"]) if described else Slo()
    key = row["point"]
    label = labels_of(described["points"])[key] if described else key
    settings = {label: _settings(described, key)} if described else {}
    return Source(
        title=f"{label}, repeat {row['repeat']}",
        runs=(partial(_run, path, row, label, slo),),
        summary={label: _intervals([row], slo)},
        machines=described["machines"] if described else (),
        settings=settings,
    )


def _run(path: Path, row: Row, label: str, slo: Slo) -> RunData:
    try:
        steps, requests = read_steps(path), read_requests(path)
    except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(one_line(f"{path}: a run that can not be read: {why}")) from None
    require(bool(steps), "report", str(path), "a run with steps")
    _check_rows(path, steps)
    figures = {name: row[name] for name in figure_names([row], _without(slo))}
    return RunData(label, steps, requests, slo, figures)


def _trace(path: Path) -> Source:
    steps = read_chrome_trace(path)
    require(bool(steps), "report", str(path), "a trace with steps")
    figures = step_figures(steps)
    run = RunData(path.name, steps, (), Slo(), figures)
    return Source(path.name, (lambda: run,), {path.name: _intervals([figures], Slo())})


def _check_rows(path: Path, steps: Sequence[StepTrace]) -> None:
    """Raise ValueError for a step whose rank is none of those that its passes have rows of."""
    for step in steps:
        for each in step.passes:
            ok = step.index < len(each.real_rows) == len(each.gathered_rows)
            allowed = "rows of each rank, this one among them"
            require(ok, f"{path}: step {step.step_id}: rows", each.real_rows, allowed)


def _without(slo: Slo) -> tuple[str, ...]:
    """Name the figures that say nothing where requests have nothing to keep."""
    return ("goodput_requests_s", "good_share") if slo == Slo() else ()


def step_figures(steps: Sequence[StepTrace]) -> Figures:
    """Sum up steps of which no requests are known."""
    figures = figures_of((), steps, Slo())
    span_s = max(map(end_s, steps)) - min(step.start_s for step in steps)
    tokens = sum(step.output_tokens for step in steps)
    known: Figures = {
        "duration_s": span_s,
        "prompt_tokens": sum(step.prompt_tokens for step in steps),
        "output_tokens": tokens,
        "output_tok_s": tokens / span_s if span_s else None,
    }
    absent = ("requests", "failed_requests", "goodput_requests_s")
    return {
        name: value
        for name, value in (figures | known).items()
        if not name.startswith(absent) and value is not None
    }


def _intervals(rows: Sequence[Row], slo: Slo) -> dict[str, Interval]:
    found = {}
    for name in figure_names(rows, (*KEYS, *_without(slo))):
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            found[name] = Interval.of(values)
    return found


def _settings(described: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return what a point was run with, by dotted names."""
    tables = {name: described["settings"].get(name, {}) for name in ("workload", "scenario")}
    engine: Mapping[str, Any] = described["configs"][key]
    return {**dict(flattened({"engine": engine, **tables})), **described["points"][key]}


def labels_of(points: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Name points in few words: the last part of a setting's name and its value."""
    names = {name for point in points.values() for name in point}
    last = {name: name.rpartition(".")[2] for name in names}
    shared = {short for short in last.values() if list(last.values()).count(short) > 1}
    written = {name: name if short in shared else short for name, short in last.items()}
    labels = {
        key: ", ".join(
            _value(value) if name == "case" else f"{written[name]} {_value(value)}"
            for name, value in point.items()
        )
        for key, point in points.items()
    }
    twice = len(set(labels.values())) < len(labels)
    return {
        key: f"{text} ({key})" if twice else text or "one point" for key, text in labels.items()
    }


def _value(value: Any) -> str:
    """Write a value, of a path its last part, of a policy its class."""
    if not isinstance(value, str):
        return str(value)
    _, is_policy, name = value.rpartition(SUFFIX)
    return name if is_policy else PurePath(value).name
