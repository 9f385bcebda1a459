"""The files of a run hold all that was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dp_runtime.experiments import read_requests, read_steps
from dp_runtime.experiments.results.run_files import read_json, read_recording, write_run
from dp_runtime.metrics.recorded.request_tokens import RequestTokens
from dp_runtime.metrics.recording import ModelSizes, Recording
from tests.dp_runtime.experiments.measurement.test_figures import RECORDS, STEPS


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    kept = RequestTokens(1, (5, 6), (7,), 3, (0,), ((8, 9),), {"logit_bias": {4: 0.5}})
    steps = tuple(replace(step, record=(1,)) for step in STEPS)
    recording = Recording(
        {"dp_size": 2}, ModelSizes(64, 8, 199, 640), steps[2:], (kept,), steps[:2]
    )
    write_run(tmp_path / "run", {"point": "a", "repeat": 0}, RECORDS, recording)
    assert read_requests(tmp_path / "run") == RECORDS
    assert tuple(read_steps(tmp_path / "run")) == steps[2:]
    assert read_recording(tmp_path / "run") == recording
    assert read_json(tmp_path / "run" / "row.json") == {"point": "a", "repeat": 0}
    assert len(list((tmp_path / "run").iterdir())) == 6
    for name in ("steps.jsonl.gz", "tokens.jsonl.gz", "recording.json"):
        file = tmp_path / "run" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-9])
        with pytest.raises(ValueError, match=r"run' is not allowed; a whole recording"):
            read_recording(tmp_path / "run")
        file.write_bytes(whole)
    (tmp_path / "run" / "warm_up.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"a recording \(No such file"):
        read_recording(tmp_path / "run")
