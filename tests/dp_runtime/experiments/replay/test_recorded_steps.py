"""Recorded rows agreed on again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dp_runtime.experiments.replay.recorded_requests import recorded_requests
from dp_runtime.experiments.replay.recorded_steps import (
    measured_steps,
    recorded_config,
    recorded_steps,
    replay_rows,
)
from dp_runtime.experiments.results.run_files import read_recording
from dp_runtime.metrics.recording import Recording


@pytest.mark.parametrize("overlap", [False, True])
def test_agreements_under_the_same_policies_are_the_recorded_ones(
    recordings: dict[bool, Recording], overlap: bool, tmp_path: Path
) -> None:
    path = tmp_path / "run.rec"
    path.write_bytes(recordings[overlap].to_bytes())
    recording = read_recording(path)
    assert recording.steps == recordings[overlap].steps
    steps = recorded_steps(recording)
    for step, agreed in zip(steps, replay_rows(recording, steps, recorded_config(recording))):
        planned = [
            (str(plan.mode), plan.padding.real_rows, plan.padding.gathered_rows)
            for plan in agreed.plans
        ]
        assert planned == step.plans
        assert agreed.step_id == step.traces[0].step_id


def test_the_same_rows_without_padding(recordings: dict[bool, Recording]) -> None:
    recording = recordings[False]
    steps = recorded_steps(recording)
    config = recorded_config(recording, padding="ragged")
    for step, agreed in zip(steps, replay_rows(recording, steps, config)):
        (plan,) = agreed.plans
        assert plan.padding.gathered_rows == plan.padding.real_rows == step.plans[0][1]


def test_what_a_replay_can_not_know_is_refused(recordings: dict[bool, Recording]) -> None:
    recording = recordings[False]
    with pytest.raises(ValueError, match="padding: 'auto' is not allowed; max_len, ragged or"):
        replay_rows(
            recording, recorded_steps(recording), recorded_config(recording, padding="auto")
        )


def test_requests_of_ranks_that_came_or_went_are_refused(recordings: dict[bool, Recording]) -> None:
    steps = recordings[False].steps
    gone = replace(recordings[False], config={**recordings[False].config, "dp_size": 4})
    with pytest.raises(ValueError, match="recording: ranks: 3 is not allowed; dp_size 4"):
        recorded_requests(gone)
    later = tuple(replace(s, epoch=int(s.step_id > steps[9].step_id)) for s in steps)
    with pytest.raises(ValueError, match="recording: epochs: 2 is not allowed; 1: ranks neither"):
        recorded_requests(replace(recordings[False], steps=later))


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b\x08cut"])
def test_what_is_no_recording_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "run.rec"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="recording: "):
        Recording.read(path)
    with pytest.raises(ValueError, match="No such file"):
        Recording.read(tmp_path / "none")


def test_steps_that_no_rank_had_are_refused(recordings: dict[bool, Recording]) -> None:
    recording = recordings[False]
    *others, last = recording.steps
    record = last.record
    for changes, message in (
        ({"passes": ()}, r"step \d+ of rank \d: passes: 0 is not allowed; at least one"),
        ({"record": record[:3]}, "record: .* is not allowed; 22 integers"),
        ({"record": ("a", *record[1:])}, "record: .* is not allowed; 22 integers"),
        ({"record": (record[0] + 1, *record[1:])}, "record: .*; records that ranks agree on"),
    ):
        edited = replace(recording, steps=(*others, replace(last, **changes)))
        with pytest.raises(ValueError, match=rf"recording: .*{message}"):
            measured_steps(edited)


def test_a_recording_of_another_version_is_refused() -> None:
    header = {"format": "dp-runtime recording", "version": 1}
    with pytest.raises(ValueError, match="recording: version: 1 is not allowed; 2"):
        Recording.from_lines(header, ())


@pytest.mark.parametrize("line", ["{}", "[]", '{"request_id": 1}'])
def test_lines_of_nothing_known_are_refused(line: str) -> None:
    header = {"format": "dp-runtime recording", "version": 2, "config": {}, "model": {}}
    sizes: tuple[dict[str, int], ...] = (
        {"tokens": 1, "warm_up": 0},
        {"tokens": 0, "warm_up": 1},
        {"tokens": -1},
        {},
    )
    for counts in sizes:
        with pytest.raises(ValueError, match=r"recording: lines: .* is not allowed"):
            Recording.from_lines(header | counts, [line])
