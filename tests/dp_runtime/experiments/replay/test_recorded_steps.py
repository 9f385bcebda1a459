"""Recorded rows agreed on again."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.experiments.replay.recorded_requests import recorded_requests
from dp_runtime.experiments.replay.recorded_steps import (
    measured_steps,
    recorded_config,
    recorded_steps,
    replay_rows,
)
from dp_runtime.experiments.replay.what_if import what_if
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
    record, (one,) = last.record, last.passes
    voted = (*record[:15], 1, *record[16:])
    first = (*record[:4], one.real_rows[0], *record[5:])
    for changes, message in (
        ({"passes": ()}, r"step \d+ of rank \d: passes: 0 is not allowed; at least one"),
        ({"record": record[:3]}, "record: .* is not allowed; 22 integers"),
        ({"record": (record[0] + 1, *record[1:])}, "record: .*; records that ranks agree on"),
        ({"record": (*record[:4], 99, *record[5:])}, r"record: real_rows: \(99,\) is not allowed"),
        ({"record": voted, "passes": (replace(one, mode="graph"),)}, r"of rank 2: passes: .*graph"),
        ({"passes": (replace(one, mode="fast"),)}, "passes: mode: 'fast' .*; graph, piecewise"),
        (
            {"passes": (replace(one, real_rows=(1,), gathered_rows=(1,)),)},
            "position: 2 is not allowed; below 1",
        ),
        ({"passes": (replace(one, gathered_rows=()),)}, r"gathered_rows: \(\) is not allowed"),
        ({"position": 0, "record": first}, r"positions: \[0, 0, 1\] is not allowed; each of 0..2"),
        ({"schedule_s": -99.0}, "seconds: -.* is not allowed; above 0 in all"),
        ({"attended_tokens": 2**40}, "attended_tokens: .* is not allowed; at most 2147483647"),
    ):
        edited = replace(recording, steps=(*others, replace(last, **changes)))
        with pytest.raises(ValueError, match=rf"recording: .*{message}"):
            measured_steps(edited)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prompt_tokens", 10**9, r"prompt_tokens: 10+ .* 1 or more that with \d+ of output"),
        ("prompt_tokens", 0, "prompt_tokens: 0 is not allowed"),
        ("max_tokens", 0, r"output_tokens: \d+ is not allowed; at most its max_tokens, 0"),
    ],
)
def test_requests_that_no_model_serves_are_refused(
    recordings: dict[bool, Recording], name: str, value: int, message: str
) -> None:
    steps = tuple(
        replace(step, arrived=tuple(each._replace(**{name: value}) for each in step.arrived))
        for step in recordings[False].steps
    )
    with pytest.raises(ValueError, match=rf"recording: request \d+: {message}"):
        recorded_requests(replace(recordings[False], steps=steps))


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every value within nested tables, and the first ones within lists."""
    inner: Any = value if isinstance(value, dict) else ()
    for name in range(min(len(value), 6)) if isinstance(value, list) else inner:
        yield (*path, name)
        yield from places(value[name], (*path, name))


def with_value(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    if not path:
        return other
    edited = value.copy()
    edited[path[0]] = with_value(value[path[0]], path[1:], other)
    return edited


def refusal(lines: Sequence[Any]) -> str:
    """Say why lines of a recording are refused; nothing where they can be told from."""
    try:
        recording = Recording.from_lines(lines[0], map(json.dumps, lines[1:]))
        what_if(recording, {"dp_size": 2, "routing": "round_robin"})
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("absurd", ["x", -1, pytest.param(2**40, marks=pytest.mark.slow)])
def test_no_edit_of_a_file_is_an_error_of_the_program(
    recordings: dict[bool, Recording], absurd: Any
) -> None:
    """Each value of the header, of a request and of a step before which some came, in turn."""
    text = gzip.decompress(recordings[True].to_bytes()).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    came = next(at for at, line in enumerate(lines) if line.get("arrived"))
    refused = [
        refusal(with_value(lines, (number, *path), absurd))
        for number in (0, 1, came)
        for path in places(lines[number])
        if number or path[0] != "config"  # whose own checks name its fields alone
    ]
    assert all(text.startswith("recording: ") for text in refused if text)
    assert len(list(filter(None, refused))) > len(refused) / 2 > 30


def test_a_recording_of_another_version_is_refused() -> None:
    header = {"format": "dp-runtime recording", "version": 1}
    with pytest.raises(ValueError, match="recording: version: 1 is not allowed; 2"):
        Recording.from_lines(header, ())


@pytest.mark.parametrize("line", ["{}", "[]", '{"request_id": 1}'])
def test_lines_of_nothing_known_are_refused(line: str) -> None:
    model = dict.fromkeys(("max_model_len", "hidden_size", "vocab_size", "cache_tokens"), 1)
    header = {"format": "dp-runtime recording", "version": 2, "config": {}, "model": model}
    sizes: tuple[dict[str, int], ...] = (
        {"tokens": 1, "warm_up": 0},
        {"tokens": 0, "warm_up": 1},
        {"tokens": -1},
        {},
    )
    for counts in sizes:
        with pytest.raises(ValueError, match=r"recording: (header|request 1|step 1|tokens): "):
            Recording.from_lines(header | counts, [line])
