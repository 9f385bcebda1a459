"""Tables of results: one row for each run, and one for each point and figure."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dp_runtime.experiments.measurement.columns import unit_of
from dp_runtime.experiments.measurement.intervals import Interval, noise_floor

Row = Mapping[str, Any]
KEYS = ("point", "repeat", "error")  # beside the grid's values; all others are figures
SUMMARY = ("figure", "unit", "mean", "low", "high", "count")


def write_tables(directory: Path, rows: Sequence[Row], varied: Sequence[str]) -> None:
    """Write results.csv and summary.csv, and results.parquet where pyarrow is installed."""
    figures = figure_names(rows, varied)
    _write_csv(directory / "results.csv", [*varied, *KEYS, *figures], rows)
    summary = list(summarised(rows, varied))
    _write_csv(directory / "summary.csv", [*varied, "point", *SUMMARY], summary)
    if find_spec("pyarrow") is not None:
        _write_parquet(directory / "results.parquet", [*varied, *KEYS, *figures], rows)


def figure_names(rows: Sequence[Row], varied: Sequence[str]) -> list[str]:
    """List the columns of figures, in the order in which they first come."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if name not in (*varied, *KEYS)]


def summarised(rows: Sequence[Row], varied: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Iterate over the means of repeats with their 95 % confidence intervals."""
    for point, own in by_point(rows).items():
        values_of_grid = {name: own[0].get(name) for name in varied}
        for name in figure_names(rows, varied):
            values = [row[name] for row in own if row.get(name) is not None]
            if values:
                interval = Interval.of(values)
                figure = {"figure": name, "unit": unit_of(name)} | vars(interval)
                yield {**values_of_grid, "point": point, **figure}


def noise(rows: Sequence[Row], varied: Sequence[str]) -> dict[str, float]:
    """Return each figure's relative standard deviation between repeats of the same point."""
    points = by_point(rows).values()
    floors = {
        name: noise_floor([[r[name] for r in own if r.get(name) is not None] for own in points])
        for name in figure_names(rows, varied)
    }
    return {name: floor for name, floor in floors.items() if floor is not None}


def by_point(rows: Sequence[Row]) -> dict[str, list[Row]]:
    points: dict[str, list[Row]] = {}
    for row in rows:
        points.setdefault(row["point"], []).append(row)
    return points


def _write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    draft = path.with_name(path.name + ".new")
    with draft.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    draft.replace(path)


def _write_parquet(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import pyarrow
    import pyarrow.parquet

    def values(name: str) -> list[Any]:
        given = [row.get(name) for row in rows]
        kinds = {type(value) for value in given if value is not None}
        mixed = bool(kinds - {int, float}) and len(kinds) > 1  # of an axis
        return [None if v is None else str(v) for v in given] if mixed else given

    units = {name: pyarrow.array(values(name)) for name in columns}
    fields = [pyarrow.field(n, c.type, metadata={"unit": unit_of(n)}) for n, c in units.items()]
    table = pyarrow.table(list(units.values()), schema=pyarrow.schema(fields))
    pyarrow.parquet.write_table(table, path)
