"""Costs that are fitted, and what is predicted from them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dp_runtime.cli.main import main
from dp_runtime.experiments.replay.cost_model import CostModel, FitError
from dp_runtime.experiments.replay.recorded_steps import (
    recorded_config,
    recorded_steps,
    replay_rows,
)
from dp_runtime.experiments.replay.step_shape import StepShape
from dp_runtime.experiments.replay.what_if import what_if
from dp_runtime.metrics.recording import Recording


@pytest.fixture
def shapes(recordings: dict[bool, Recording]) -> list[StepShape]:
    steps = recorded_steps(recordings[False])
    agreed = replay_rows(recordings[False], steps, recorded_config(recordings[False]))
    return [step.shape(each) for step, each in zip(steps, agreed)]


def test_a_fit_finds_what_times_were_made_of(shapes: list[StepShape]) -> None:
    made = CostModel({"step": 2e-3, "row of the largest rank": 3e-5, "token": 1e-5})
    costs = CostModel.fit(shapes, [made(shape) for shape in shapes])
    assert all(cost >= 0 for cost in costs.seconds.values())
    error = FitError.of(shapes, list(map(costs, shapes)), list(map(made, shapes)))
    assert error.p90 < 1e-3


def test_a_pause_does_not_move_a_fit(shapes: list[StepShape]) -> None:
    made = CostModel({"step": 2e-3, "row of the largest rank": 3e-5})
    measured = [made(shape) * (50 if number % 9 == 4 else 1) for number, shape in enumerate(shapes)]
    costs = CostModel.fit(shapes, measured)
    assert FitError.of(shapes, list(map(costs, shapes)), list(map(made, shapes))).p50 < 0.02


def test_steps_of_the_same_rows_tell_the_noise_from_the_error(shapes: list[StepShape]) -> None:
    like = [shapes[0]] * 6
    error = FitError.of(like, [2.0] * 6, [1.0, 1.0, 1.0, 1.0, 1.5, 1.5])
    assert (error.alike_p50, error.noise, error.p90) == (1.0, 0.0, 1.0)
    assert (error.factor, error.scaled_p50) == (0.5, 0.0)
    assert FitError.of(like[:4], [2.0] * 4, [1.0] * 4).alike_p50 is None


def test_few_steps_are_refused(shapes: list[StepShape]) -> None:
    with pytest.raises(ValueError, match=r"at least \d+ to fit \d+ costs"):
        CostModel.fit(shapes[:5], [1.0] * 5)


def test_without_padding_nothing_is_wasted(recordings: dict[bool, Recording]) -> None:
    measured, predicted, changed = what_if(recordings[False], {"padding": "ragged"}).lines
    assert (measured.steps, measured.rows_per_step) == (changed.steps, changed.rows_per_step)
    assert measured.padding_waste == predicted.padding_waste > 0
    assert changed.padding_waste == 0
    assert changed.row_balance == measured.row_balance


def test_more_ranks_serve_the_same_tokens(recordings: dict[bool, Recording]) -> None:
    recording = recordings[False]
    changes = {"dp_size": 16, "routing": "round_robin"}
    measured, _, changed = what_if(recording, changes, [recording]).lines
    assert measured.total_s > 0
    assert changed.total_s > 0
    assert changed.row_balance < measured.row_balance
    assert changed.steps < measured.steps


def test_a_command_prints_and_writes_it(
    recordings: dict[bool, Recording], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "run.rec", tmp_path / "out.json"
    path.write_bytes(recordings[True].to_bytes())
    flags = ["--max-num-tokens", "16", "--link-gbps", "100", "--fit", str(path)]
    assert main(["replay", str(path), *flags, "--output", str(out)]) == 0
    text = capsys.readouterr().out
    assert "max_num_tokens=16, link_gbps=100.0" in text
    assert "costs: " in text
    lines = json.loads(out.read_text())["lines"]
    assert [line["name"] for line in lines][:2] == ["recorded, measured", "recorded, predicted"]
    assert lines[2]["steps"] > 0


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({"seed": 1}, "replay: changes"), ({"dp_size": 0}, "dp_size"), ({"routing": "x"}, "routing")],
)
def test_mistakes_are_named(
    recordings: dict[bool, Recording], changes: dict[str, object], allowed: str
) -> None:
    with pytest.raises(ValueError, match=allowed):
        what_if(recordings[False], changes)
