"""The files of one run: its row, its requests and its steps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace

ROW, REQUESTS, STEPS = "row.json", "requests.jsonl.gz", "steps.jsonl.gz"


def write_run(
    directory: Path, row: dict[str, Any], records: Sequence[RequestRecord],
    steps: Sequence[StepTrace],
) -> None:  # fmt: skip
    """Write all files of a run; the row comes last, and tells that the run is finished."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_lines(directory / REQUESTS, records)
    _write_lines(directory / STEPS, steps)
    write_json(directory / ROW, row)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole, or not at all."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_steps(directory: Path) -> list[StepTrace]:
    """Read the steps of all ranks as the engine has remembered them."""
    return [_step(values) for values in _read_lines(directory / STEPS)]


def read_requests(directory: Path) -> list[RequestRecord]:
    return [
        RequestRecord(**{**values, "arrivals": tuple(map(tuple, values["arrivals"]))})
        for values in _read_lines(directory / REQUESTS)
    ]


def _step(values: dict[str, Any]) -> StepTrace:
    passes = tuple(PassTrace(**_with_tuples(each)) for each in values["passes"])
    prefixes = PrefixCounts(**values["prefixes"])
    return StepTrace(**_with_tuples(values) | {"passes": passes, "prefixes": prefixes})


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }


def _write_lines(path: Path, values: Sequence[Any]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        file.writelines(json.dumps(asdict(value)) + "\n" for value in values)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
