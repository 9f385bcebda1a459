"""A recording served anew by real ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.main import main
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.experiments.replay.cost_model import CostModel
from dp_runtime.experiments.replay.device import on_device
from dp_runtime.experiments.replay.device.on_device import OnDevice, replay_on_device
from dp_runtime.experiments.replay.device.ranks import Replayed
from dp_runtime.experiments.replay.device.requests import LEAD
from dp_runtime.experiments.replay.recorded_steps import measured_steps, recorded_steps
from dp_runtime.metrics.recording import Recording

POLICIES = Path(__file__).parents[4] / "examples" / "experiments" / "my_policy.py"
COSTS = CostModel({"step": 1e-3})


def replayed(recording: Recording, **changes: object) -> OnDevice:
    return replay_on_device(recording, {"device": "cpu", **changes}, COSTS)


@pytest.mark.parametrize("overlap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_under_the_same_policies_rows_agreements_and_tokens_are_the_recorded_ones(
    recordings: dict[bool, Recording], overlap: bool
) -> None:
    recording = recordings[overlap]
    same = replayed(recording).same
    assert same.steps == len(recorded_steps(recording)) > 20
    assert (same.rows, same.agreements) == (same.steps, same.steps)
    assert (same.requests, same.tokens) == (20, 20)


def test_other_policies_have_the_same_rows_and_tokens(recordings: dict[bool, Recording]) -> None:
    found = replayed(recordings[True], padding="ragged", moe_sharding="tp")
    assert found.same.rows == found.same.steps > found.same.agreements
    assert found.same.tokens == 20
    assert found.line.padding_waste == 0


@pytest.mark.slow
def test_without_recorded_tokens_the_rows_are_the_same(recordings: dict[bool, Recording]) -> None:
    same = replayed(replace(recordings[True], tokens=())).same
    assert same.agreements == same.steps > 0
    assert same.requests == 0
    assert "tokens" not in str(same)


@pytest.mark.slow
def test_lengths_of_drafts_that_follow_from_all_steps_before_are_the_same() -> None:
    config = EngineConfig(
        str(TINY_MODEL), dp_size=2, device="cpu", launcher="thread", max_moves=0,
        speculative_num_steps=3, speculative_draft_length=f"{POLICIES}:OneMoreOrLess",
    )  # fmt: skip
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    with Engine(config) as engine:
        handles = [engine.submit([at, 5, 6], params) for at in range(5)]
        for handle in handles:
            handle.result()
        recording = engine.recording(handles)
    assert len({step.num_drafts for step in recording.steps}) > 1
    same = replayed(recording).same
    assert same.agreements == same.steps
    assert same.tokens == 5


@pytest.mark.slow
def test_samples_and_ends_by_tokens_are_the_same(replay_model: Path) -> None:
    config = EngineConfig(
        str(replay_model), dp_size=2, device="cpu", launcher="thread", overlap=True, max_moves=0
    )
    params = SamplingParams(max_tokens=40, temperature=0.8, logit_bias={3: 1.0})
    with Engine(config) as engine:
        whole = engine.generate([[5, 6, 7]], replace(params, seed=7))[0].token_ids
        ends = replace(params, seed=7, stop_token_ids=(whole[9],))
        handles = [engine.submit([5, 6, 7], ends), engine.submit([8] * 90, params)]
        lengths = [len(handle.result().token_ids) for handle in handles]
        recording = engine.recording(handles)
    assert lengths[0] <= 10
    same = replayed(recording).same
    assert same.agreements == same.steps
    assert (same.requests, same.tokens) == (2, 2)


def test_a_command_serves_it_at_its_times_by_another_routing(
    recordings: dict[bool, Recording], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "run.rec", tmp_path / "out.json"
    path.write_bytes(recordings[False].to_bytes())
    flags = ["--device", "cpu", "--routing", "round_robin", "--dp-size", "2"]
    assert main(["replay", str(path), *flags, "--output", str(out)]) == 0
    assert "routing=round_robin, measured" in capsys.readouterr().out
    found = json.loads(out.read_text())["on_device"]
    assert found["same"] == {"steps": 0, "rows": 0, "agreements": 0, "requests": 20, "tokens": 20}
    assert found["line"]["total_s"] > 0


def test_the_time_of_a_step_is_the_median_of_its_repeats(
    recordings: dict[bool, Recording], monkeypatch: pytest.MonkeyPatch
) -> None:
    recording, slower = recordings[False], iter((3.0, 1.0, 2.0))
    first = recorded_steps(recording)[0].traces[0].step_id

    def again(*_: object) -> Replayed:
        late_s = next(slower)
        steps = tuple(
            replace(
                step, step_id=step.step_id - first + LEAD, agree_wait_s=step.agree_wait_s + late_s
            )
            for step in recording.steps
        )
        whole = replace(recording, steps=steps)
        return Replayed(whole, whole, {})

    monkeypatch.setattr(on_device, "replay_at_steps", again)
    found = replay_on_device(recording, {"device": "cpu"}, COSTS, repeats=3)
    _, recorded_s = measured_steps(recording)
    assert found.line.total_s == pytest.approx(sum(recorded_s) + 2.0 * len(recorded_s))
    assert found.same.agreements == found.same.steps
    with pytest.raises(ValueError, match="repeats: 2 is not allowed; 1 where requests come"):
        replay_on_device(recording, {"device": "cpu", "dp_size": 2}, COSTS, repeats=2)


def test_settings_of_ranks_need_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["replay", str(tmp_path), "--overlap"]) == 2
    assert "replay: 'overlap' is not allowed; none without --device" in capsys.readouterr().err


def test_a_model_is_named_as_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", "run.rec", "--device", "cpu", "--model", "tiny_moon"]) == 2
    assert "model: 'tiny_moon' is not allowed; a directory, or one of" in capsys.readouterr().err
