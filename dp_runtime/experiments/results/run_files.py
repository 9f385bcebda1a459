"""The files of one run: its row, its requests and its steps."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from dp_runtime.errors import not_allowed, require
from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.experiments.results.tables import KEYS
from dp_runtime.metrics.recorded.typed_fields import check_fields
from dp_runtime.metrics.recording import Recording, readable, steps_of
from dp_runtime.metrics.trace import StepTrace

ROW, REQUESTS, STEPS = "row.json", "requests.jsonl.gz", "steps.jsonl.gz"
# With STEPS, a recording:
HEADER, TOKENS, WARM_UP = "recording.json", "tokens.jsonl.gz", "warm_up.jsonl.gz"


def write_run(
    directory: Path, row: dict[str, Any], records: Sequence[RequestRecord],
    recording: Recording | None = None,
) -> None:  # fmt: skip
    """Write all files of a run; the row comes last, and tells that the run is finished."""
    directory.mkdir(parents=True, exist_ok=True)
    _write_lines(directory / REQUESTS, records)
    _write_lines(directory / STEPS, recording.steps if recording else ())
    if recording is not None:
        _write_lines(directory / TOKENS, recording.tokens)
        _write_lines(directory / WARM_UP, recording.warm_up)
        write_json(directory / HEADER, recording.header)
    write_json(directory / ROW, row)


def write_json(path: Path, value: Any) -> None:
    """Write a file whole, or not at all."""
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")
    draft.replace(path)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_row(directory: Path) -> dict[str, Any] | None:
    """Read the row of a run, None if it has not ended; ValueError if the file is broken."""
    path = directory / ROW
    if not path.exists():
        return None
    written = path.read_bytes()
    try:
        row = json.loads(written)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict) or not _is_row(row):
        allowed = "the whole row of a run; remove the file, and --resume runs this run again"
        raise not_allowed(str(path), written, allowed)
    return row


def _is_row(row: dict[str, Any]) -> bool:
    kinds = [type(row.get(name)) for name in KEYS]
    figures = [value for name, value in row.items() if name not in KEYS]
    return kinds == [str, int, str] and all(isinstance(v, int | float | None) for v in figures)


def read_steps(directory: Path) -> list[StepTrace]:
    """Read the steps of all ranks as the engine has remembered them."""
    with gzip.open(directory / STEPS, "rt", encoding="utf-8") as file:
        return list(steps_of(file))


def read_recording(path: Path) -> Recording:
    """Read a recording: a file, or the directory of an experiment's run."""
    if not path.is_dir():
        return Recording.read(path)
    ok, allowed = (path / HEADER).exists(), f"a directory with {HEADER}: that of a run"
    require(ok, "recording", str(path), allowed)
    with readable(path), ExitStack() as stack:
        files = [
            stack.enter_context(gzip.open(path / name, "rt", encoding="utf-8"))
            for name in (TOKENS, WARM_UP, STEPS)
        ]
        return Recording.from_lines(read_json(path / HEADER), chain(*files))


def read_requests(directory: Path) -> list[RequestRecord]:
    lines = _read_lines(directory / REQUESTS)
    records = [
        RequestRecord(**{**values, "arrivals": tuple(map(tuple, values["arrivals"]))})
        for values in lines
    ]
    for number, record in enumerate(records, 1):
        check_fields(record, f"request {number}", least=-1)
        pairs = all(len(each) == 2 and 0 < each[1] < 2**31 for each in record.arrivals)
        ok = pairs and (bool(record.error) or bool(record.arrivals))
        allowed = "pairs of a time and a count above 0, one at least without an error"
        require(ok, f"request {number}: arrivals", record.arrivals, allowed)
    return records


def _write_lines(path: Path, values: Sequence[Any]) -> None:
    with gzip.open(path, "wt", encoding="utf-8", compresslevel=5) as file:
        file.writelines(json.dumps(asdict(value)) + "\n" for value in values)


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)
