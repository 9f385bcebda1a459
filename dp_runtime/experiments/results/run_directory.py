"""RunDirectory: where an experiment keeps what it has found, run by run, so that it can go on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dp_runtime.errors import not_allowed, require, shown
from dp_runtime.experiments.experiment import Experiment
from dp_runtime.experiments.input_paths import digests
from dp_runtime.experiments.machine import describe_machine
from dp_runtime.experiments.measurement.columns import COLUMNS, RANK_COLUMNS
from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.experiments.point import Run
from dp_runtime.experiments.results.directory_lock import LOCK, locked
from dp_runtime.experiments.results.run_files import read_json, read_row, write_json, write_run
from dp_runtime.experiments.results.tables import Row, noise, write_tables
from dp_runtime.experiments.tables import flattened
from dp_runtime.metrics.recording import Recording

RUN, RUNS = "run.json", "runs"
FORMAT = 1
RESUMED = {"settings": dict, "inputs": dict, "machines": list}  # what is read again
MAY_GROW = ("repeats", "grid", "cases", "order", "time_limit_s")  # of a run that is resumed


class RunDirectory:
    def __init__(self, path: Path, experiment: Experiment) -> None:
        self.path, self._experiment = path, experiment
        self._machines: list[dict[str, Any]] = []  # that its runs were on

    @property
    def varied(self) -> list[str]:
        """List the columns that tell points apart."""
        return list(dict.fromkeys(n for point in self._experiment.points for n in point.varied))

    @contextmanager
    def open(self, resume: bool) -> Iterator[None]:
        """Begin a new directory or, to resume, one of the same experiment (ValueError), alone."""
        self._check_begun(resume)  # nothing is left in a directory that is something else
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_allowed("out", str(self.path), f"a directory ({error.strerror})") from None
        with locked(self.path):
            self._machines = self.check(resume)  # another may have begun since the first look
            self._begin()
            yield

    def check(self, resume: bool) -> list[dict[str, Any]]:
        """Raise ValueError where `open` would; return the machines of what was run before."""
        if not self._check_begun(resume):
            return []
        described = self._described()
        self._check_same(described)
        machines: list[dict[str, Any]] = described["machines"]
        return machines

    def _begin(self) -> None:
        (self.path / RUNS).mkdir(exist_ok=True)
        if (machine := describe_machine()) not in self._machines:
            self._machines.append(machine)
        self.write()

    def _check_begun(self, resume: bool) -> bool:
        """Tell whether the directory has results; ValueError if these are not to be resumed."""
        there = next(each for each in (self.path, *self.path.absolute().parents) if each.exists())
        require(there.is_dir(), "out", str(self.path), f"a directory ({there} is a file)")
        begun = (self.path / RUN).exists()
        holds = begun or (self.path.is_dir() and any(f.name != LOCK for f in self.path.iterdir()))
        allowed = "a new directory, or --resume to go on with what is there"
        require((resume and begun) or not holds, "out", str(self.path), allowed)
        return begun

    def _described(self) -> dict[str, Any]:
        """Read run.json; ValueError if it does not have what a resumed experiment needs."""
        try:
            described = read_json(self.path / RUN)
            for name, kind in RESUMED.items():
                if not isinstance(described[name], kind):
                    raise TypeError(f"{name} is {shown(described[name])}")
            return {name: described[name] for name in RESUMED}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            why = f"{type(error).__name__}: {error}"
            raise not_allowed(
                "out", str(self.path), f"results with a whole {RUN} ({why})"
            ) from None

    def is_done(self, run: Run) -> bool:
        """Tell whether a run has ended well; one that failed is run again."""
        row = self._row(run)
        return row is not None and not row["error"]

    def add(
        self, run: Run, figures: Mapping[str, Any], records: Sequence[RequestRecord],
        recording: Recording | None = None, error: str = "",
    ) -> None:  # fmt: skip
        row = {"point": run.point.key, "repeat": run.repeat, "error": error, **figures}
        write_run(self.path / RUNS / run.name, row, records, recording)
        self.write()

    def rows(self) -> list[Row]:
        """Return the rows of all runs that have ended, in the order of points and repeats."""
        runs = sorted(self._experiment.runs(), key=lambda run: run.repeat)
        places = {point.key: at for at, point in enumerate(self._experiment.points)}
        runs.sort(key=lambda run: places[run.point.key])
        return [row for run in runs if (row := self._row(run)) is not None]

    def write(self) -> None:
        """Write the tables and run.json anew."""
        rows = self.rows()
        write_tables(self.path, rows, self.varied)
        write_json(self.path / RUN, self._description(rows))

    def _row(self, run: Run) -> Row | None:
        row = read_row(self.path / RUNS / run.name)
        varied = {name: run.point.varied.get(name) for name in self.varied}
        return None if row is None else {**varied, **row}

    def _description(self, rows: Sequence[Row]) -> dict[str, Any]:
        experiment = self._experiment
        columns = {column.name: column._asdict() for column in (*RANK_COLUMNS, *COLUMNS)}
        return {
            "format": FORMAT,
            "name": experiment.plan.name,
            "settings": experiment.document,
            "plan": asdict(experiment.plan),
            "slo": asdict(experiment.slo),
            "inputs": self._inputs(),
            "machines": self._machines,
            "points": {point.key: dict(point.varied) for point in experiment.points},
            "configs": {point.key: asdict(point.config) for point in experiment.points},
            "runs": len(experiment.points) * experiment.plan.repeats,
            "runs_done": sum(not row["error"] for row in rows),
            "runs_failed": sum(bool(row["error"]) for row in rows),
            "noise_floor": noise(rows, self.varied),
            "columns": columns,
        }

    def _inputs(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for point in self._experiment.points:
            found |= digests(point.document)
        return found

    def _check_same(self, described: dict[str, Any]) -> None:
        """Raise ValueError where settings or input files are others than those of the directory."""
        allowed = f"as in {self.path / RUN}; only {', '.join(MAY_GROW)} may change"
        before = dict(flattened(described["settings"]))
        now = dict(flattened(dict(self._experiment.document)))
        for name in before.keys() | now.keys():
            same = before.get(name) == now.get(name) or name.split(".")[0] in MAY_GROW
            require(same, name, now.get(name), f"{before.get(name)!r}, {allowed}")
        for path, digest in self._inputs().items():
            known = described["inputs"].get(path, digest)
            require(known == digest, "path", path, "a file as it was when the experiment began")
