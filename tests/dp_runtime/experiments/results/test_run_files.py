"""The files of a run hold all that was measured."""

from __future__ import annotations

from pathlib import Path

from dp_runtime.experiments import read_requests, read_steps
from dp_runtime.experiments.results.run_files import read_json, write_run
from tests.dp_runtime.experiments.measurement.test_figures import RECORDS, STEPS


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    write_run(tmp_path / "run", {"point": "a", "repeat": 0}, RECORDS, STEPS)
    assert read_requests(tmp_path / "run") == RECORDS
    assert read_steps(tmp_path / "run") == STEPS
    assert read_json(tmp_path / "run" / "row.json") == {"point": "a", "repeat": 0}
    assert len(list((tmp_path / "run").iterdir())) == 3
