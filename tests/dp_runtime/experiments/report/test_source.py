"""A report is made of results, a run or a trace; anything else is one clear error."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.experiments import write_report
from dp_runtime.experiments.report.source import Source, labels_of
from dp_runtime.experiments.results.run_files import read_json, write_json
from dp_runtime.metrics.chrome_trace import chrome_trace
from dp_runtime.metrics.status import RankHealth, RankState
from tests.dp_runtime.experiments.report.runs import make_steps, write_results


def written_trace(path: Path, num_steps: int) -> Path:
    ranks = [RankHealth(rank, RankState.IDLE, pid=1, host="a") for rank in (0, 1)]
    path.write_text("".join(chrome_trace(make_steps(num_steps), ranks)), encoding="utf-8")
    return path


def test_a_trace_has_the_figures_of_its_steps(tmp_path: Path) -> None:
    steps = make_steps(25)
    source = Source.read(written_trace(tmp_path / "trace.json", 25))
    figures = source.load(0).figures
    real = sum(sum(step.passes[0].real_rows) for step in steps if step.dp_rank == 0)
    gathered = sum(sum(step.passes[0].gathered_rows) for step in steps if step.dp_rank == 0)
    assert figures["padding_waste"] == pytest.approx(1 - real / gathered)
    assert figures["output_tokens"] == sum(step.output_tokens for step in steps)
    assert figures["steps"] == 25
    assert "requests" not in figures
    assert write_report(tmp_path / "trace.json") == tmp_path / "trace.html"


def test_labels_are_short_and_differ() -> None:
    points = {"a": {"engine.padding": "x/my.py:P", "workload.skew.seed": 1},
              "b": {"engine.padding": "ragged", "workload.skew.seed": 2}}  # fmt: skip
    assert labels_of(points) == {"a": "padding P, seed 1", "b": "padding ragged, seed 2"}
    assert labels_of({"a": {"engine.seed": 1, "workload.seed": 2}}) == {
        "a": "engine.seed 1, workload.seed 2"
    }
    assert labels_of({"a": {"case": "slow"}}) == {"a": "slow"}
    assert labels_of({"a": {}}) == {"a": "one point"}
    assert len(set(labels_of({"a": {"x": "p/q"}, "b": {"x": "r/q"}}).values())) == 2


def no_file(path: Path) -> Path:
    return path / "none"


def empty_directory(path: Path) -> Path:
    return path


def text(path: Path) -> Path:
    (path / "text").write_text("no trace")
    return path / "text"


def other_json(path: Path) -> Path:
    (path / "a.json").write_text('{"traceEvents": [{"ph": "X", "name": "other"}]}')
    return path / "a.json"


def list_json(path: Path) -> Path:
    (path / "a.json").write_text("[1, 2]")
    return path / "a.json"


def binary(path: Path) -> Path:
    (path / "a.json").write_bytes(b"\xff\xfe\x00")
    return path / "a.json"


def trace_without_steps(path: Path) -> Path:
    return written_trace(path / "trace.json", 0)


def broken_description(path: Path) -> Path:
    write_results(path / "grid", [{}], repeats=1)
    (path / "grid" / "run.json").write_text("{")
    return path / "grid"


def other_description(path: Path) -> Path:
    write_json(path / "run.json", {"name": "other"})
    return path


def truncated_steps(path: Path) -> Path:
    run = write_results(path / "grid", [{}], repeats=1) / "runs" / "key0-0"
    file = run / "steps.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-20])
    return run


def other_steps(path: Path) -> Path:
    grid = write_results(path / "grid", [{}], repeats=1)
    with gzip.open(grid / "runs" / "key0-0" / "steps.jsonl.gz", "wt") as file:
        file.write('{"a": 1}\n')
    return grid


def missing_requests(path: Path) -> Path:
    run = write_results(path / "grid", [{}], repeats=1) / "runs" / "key0-0"
    (run / "requests.jsonl.gz").unlink()
    return run


def broken_row(path: Path) -> Path:
    grid = write_results(path / "grid", [{}], repeats=2)
    (grid / "runs" / "key0-1" / "row.json").write_text('{"point": "key0", "re')
    return grid


def row_without_a_point(path: Path) -> Path:
    grid = write_results(path / "grid", [{}], repeats=2)
    row = grid / "runs" / "key0-1" / "row.json"
    write_json(row, read_json(row) | {"point": ["key0"]})
    return grid


def other_machines(path: Path) -> Path:
    grid = write_results(path / "grid", [{}], repeats=1)
    write_json(grid / "run.json", read_json(grid / "run.json") | {"machines": ["mine"]})
    return grid


def edited_line(path: Path, name: str, **fields: Any) -> Path:
    run = write_results(path / "grid", [{}], repeats=1) / "runs" / "key0-0"
    with gzip.open(run / name, "rt") as file:
        first, *others = map(json.loads, file)
    with gzip.open(run / name, "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in (first | fields, *others))
    return run


def step_of_no_rank(path: Path) -> Path:
    return edited_line(path, "steps.jsonl.gz", position=7)


def request_without_an_answer(path: Path) -> Path:
    return edited_line(path, "requests.jsonl.gz", arrivals=[])


def failed_runs(path: Path) -> Path:
    grid = write_results(path / "grid", [{}], repeats=1)
    row = grid / "runs" / "key0-0" / "row.json"
    write_json(row, read_json(row) | {"error": "it failed"})
    return grid


def failed_run(path: Path) -> Path:
    return failed_runs(path) / "runs" / "key0-0"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (no_file, "a directory of `experiment`, one of its runs, or a file of --trace"),
        (empty_directory, "a directory of `experiment`"),
        (text, "not a trace in JSON"),
        (binary, "not a trace in JSON"),
        (other_json, "not a trace of --trace"),
        (list_json, "not a trace of --trace"),
        (trace_without_steps, "a trace with steps"),
        (broken_description, "results that can not be read"),
        (other_description, "results that can not be read"),
        (truncated_steps, "a run that can not be read"),
        (other_steps, "a run that can not be read"),
        (missing_requests, "a run that can not be read"),
        (broken_row, "key0-1/row.json: .* the whole row of a run; remove the file"),
        (row_without_a_point, "key0-1/row.json: .* the whole row of a run"),
        (other_machines, "results that can not be read: .*points, machines and noise_floor are"),
        (step_of_no_rank, r"step \d+: rows: .* rows of each rank, this one among them"),
        (request_without_an_answer, r"request 1: arrivals: \(\) is not allowed"),
        (failed_runs, "results with a run that has ended well"),
        (failed_run, "a run without an error: it failed"),
    ],
)
def test_bad_sources(tmp_path: Path, make: Callable[[Path], Path], why: str) -> None:
    with pytest.raises(ValueError, match=why) as error:
        write_report(make(tmp_path))
    assert "\n" not in str(error.value)
    assert list(tmp_path.glob("**/*.html")) == []


def test_an_output_that_can_not_be_written(tmp_path: Path) -> None:
    trace = written_trace(tmp_path / "trace.json", 2)
    with pytest.raises(ValueError, match=r"output: .* is not allowed; a file"):
        write_report(trace, tmp_path / "none" / "page.html")
