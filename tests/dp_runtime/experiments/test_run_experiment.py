"""Experiments that run, with ranks that are threads."""

from __future__ import annotations

import csv
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from dp_runtime.cli.main import main
from dp_runtime.experiments import Experiment, read_requests, read_steps, run_experiment
from dp_runtime.experiments.point import Run
from dp_runtime.experiments.replay.cost_model import CostModel
from dp_runtime.experiments.replay.device.on_device import replay_on_device
from dp_runtime.experiments.results.run_directory import RunDirectory
from dp_runtime.experiments.results.run_files import read_recording
from tests.checkpoints import tiny_checkpoint

TOML = """
name = "padding"
repeats = 1
warm_up_requests = 1
[engine]
model = "model"
dp_size = 2
device = "cpu"
launcher = "thread"
max_model_len = 64
page_size = 16
[workload]
num_requests = 6
turns = 2
arrivals = {kind = "poisson", rate = 200}
prompts = {kind = "fixed", tokens = 5}
outputs = {kind = "fixed", tokens = 4}
skew = {kind = "counts", conversations = [3, 0]}
[grid]
engine.padding = ["max_len", "ragged"]
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, an experiment and its results."""
    directory = tmp_path_factory.mktemp("lab")
    tiny_checkpoint(directory / "model")
    (directory / "padding.toml").write_text(TOML)
    out = directory / "out"
    assert main(["experiment", str(directory / "padding.toml"), "--out", str(out)]) == 0
    return directory


def rows_of(directory: Path, name: str = "results.csv") -> list[dict[str, str]]:
    with (directory / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_row_is_one_run_with_exact_figures(lab: Path) -> None:
    rows = rows_of(lab / "out")
    assert [(row["engine.padding"], row["repeat"]) for row in rows] == [
        ("max_len", "0"),
        ("ragged", "0"),
    ]
    for row in rows:
        assert row["error"] == ""
        assert (row["requests"], row["failed_requests"]) == ("6", "0")
        assert (row["prompt_tokens"], row["output_tokens"]) == (str(3 * (5 + 14)), "24")
        assert (row["requests_0"], row["requests_1"], row["output_tokens_1"]) == ("6", "0", "0")
        waste = 0.5 if row["engine.padding"] == "max_len" else 0.0
        assert float(row["padding_waste"]) == pytest.approx(waste)
        assert float(row["row_balance"]) == pytest.approx(0.5)


def test_the_directory_has_tables_settings_and_each_run_s_files(lab: Path) -> None:
    described = json.loads((lab / "out" / "run.json").read_text())
    assert (described["runs"], described["runs_done"], described["runs_failed"]) == (2, 2, 0)
    assert described["settings"]["workload"]["num_requests"] == 6
    assert described["machines"][0]["versions"]["torch"]
    table = pyarrow.parquet.read_table(lab / "out" / "results.parquet")
    assert table.column("requests").to_pylist() == [6] * 2
    assert table.schema.field("ttft_ms_p50").metadata == {b"unit": b"ms"}
    summary = rows_of(lab / "out", "summary.csv")
    waste = {row["engine.padding"]: row for row in summary if row["figure"] == "padding_waste"}
    assert float(waste["max_len"]["mean"]) == pytest.approx(0.5)
    assert waste["max_len"]["low"] == "", "one run says nothing of the noise"
    runs = sorted((lab / "out" / "runs").iterdir())
    assert len(runs) == 2
    requests, steps = read_requests(runs[0]), read_steps(runs[0])
    assert [(each.conversation, each.turn, each.output_tokens) for each in requests] == [
        (conversation, turn, 4) for conversation in range(3) for turn in range(2)
    ]
    ends = {each.conversation: each.arrivals[-1][0] for each in requests if each.turn == 0}
    assert all(each.submitted_s >= ends[each.conversation] for each in requests if each.turn)
    assert {step.dp_rank for step in steps} == {0, 1}
    assert all(one.real_rows[1] == 0 for step in steps for one in step.passes)
    assert sum(step.output_tokens for step in steps) == 24, "nothing of the warm-up is counted"


def test_a_run_on_real_ranks_again_has_the_same_rows_agreements_and_tokens(lab: Path) -> None:
    recording = read_recording(next((lab / "out" / "runs").iterdir()))
    found = replay_on_device(recording, {"device": "cpu"}, CostModel({"step": 1e-3}))
    same, warm_up = found.same, len({step.step_id for step in recording.warm_up})
    assert same.rows == same.agreements == same.steps == warm_up + found.line.steps
    assert (same.requests, same.tokens) == (6 + 2, 6 + 2), "those of the warm-up, too"


@pytest.fixture
def served(lab: Path, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Every run that is asked for, which has what another has had instead of an engine."""
    directory, runs = next((lab / "out" / "runs").iterdir()), list[Run]()

    def serve(experiment: Experiment, run: Run) -> Any:
        runs.append(run)
        return read_requests(directory), read_recording(directory)

    monkeypatch.setattr(sys.modules[run_experiment.__module__], "_served", serve)
    return runs


def test_what_is_done_is_not_run_again_and_more_repeats_are(
    lab: Path, served: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = lab / "out", lab / "padding.toml"
    before = rows_of(out)
    with pytest.raises(ValueError, match="a new directory, or --resume"):
        run_experiment(Experiment.from_file(file), out)
    (lab / "more.toml").write_text(TOML.replace("repeats = 1", "repeats = 3"))
    assert main(["experiment", str(lab / "more.toml"), "--out", str(out), "--resume"]) == 0
    after = rows_of(out)
    assert [row for row in after if row["repeat"] == "0"] == before
    assert [run.repeat for run in served] == [1, 1, 2, 2]
    assert len(after) == 6
    assert "6 runs, 0 failed" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["noise_floor"]["output_tok_s"] > 0


def test_changed_settings_and_files_are_noticed(lab: Path) -> None:
    changed = TOML.replace("rate = 200", "rate = 100")
    (lab / "changed.toml").write_text(changed)
    changed_lab = RunDirectory(lab / "out", Experiment.from_file(lab / "changed.toml"))
    message = r"workload.arrivals.rate: 100 is not allowed; 200, as in"
    with pytest.raises(ValueError, match=message), changed_lab.open(resume=True):
        pass


BROKEN = ["", "{}", "[]", '{"settings": [], "inputs": {}, "machines": []}']


@pytest.mark.parametrize("text", BROKEN)
def test_a_directory_with_broken_settings_is_not_resumed(
    lab: Path, tmp_path: Path, text: str
) -> None:
    (tmp_path / "run.json").write_text(text)
    results = RunDirectory(tmp_path, Experiment.from_file(lab / "padding.toml"))
    message = r"out: .* is not allowed; results with a whole run.json"
    with pytest.raises(ValueError, match=message), results.open(resume=True):
        pass


@pytest.mark.parametrize("text", ['{"point": "9', "", "[]", "{}", "[" * 10**5])
def test_a_broken_row_is_named_and_removing_it_runs_its_run_again(
    lab: Path, tmp_path: Path, served: list[Run], text: str
) -> None:
    experiment = Experiment.from_file(lab / "padding.toml")
    run_experiment(experiment, tmp_path / "out")
    row = tmp_path / "out" / "runs" / served.pop().name / "row.json"
    row.write_text(text)
    message = r"row.json: .* the whole row of a run; remove the file, and --resume runs this run"
    with pytest.raises(ValueError, match=message):
        run_experiment(experiment, tmp_path / "out", resume=True)
    assert row.read_text() == text
    row.unlink()
    served.clear()
    assert run_experiment(experiment, tmp_path / "out", resume=True).runs == 2
    assert [run.name for run in served] == [row.parent.name]


@pytest.mark.parametrize("resume", [False, True])
def test_a_directory_is_of_one_experiment_at_a_time(
    lab: Path, tmp_path: Path, resume: bool
) -> None:
    """The second can do nothing, and the first is not harmed; who is gone holds nothing."""
    experiment = Experiment.from_file(lab / "padding.toml")
    with RunDirectory(tmp_path, experiment).open(resume):
        before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
        with pytest.raises(ValueError, match="a directory that no experiment is writing into now"):
            run_experiment(experiment, tmp_path, resume=True)
        assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == before
    with RunDirectory(tmp_path, experiment).open(resume=True):
        assert (tmp_path / "run.json").exists()


def test_a_directory_of_something_else_is_left_as_it_is(lab: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="a new directory, or --resume"):
        run_experiment(Experiment.from_file(lab / "padding.toml"), tmp_path, resume=True)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_point_that_fails_is_a_row_and_ends_nothing(lab: Path, tmp_path: Path) -> None:
    """The second point's prompts are longer than the model's context."""
    text = TOML.partition("[grid]")[0]
    (lab / "fails.toml").write_text(f"{text}[grid]\nengine.max_model_len = [64, 16]\n")
    arguments = ["experiment", str(lab / "fails.toml"), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    good, bad = rows_of(tmp_path / "out")
    assert (good["error"], good["output_tokens"]) == ("", "24")
    assert bad["error"].startswith("ValueError: workload: 18 is not allowed; at most 16 tokens")
    assert bad["output_tokens"] == ""


@pytest.mark.parametrize(
    ("setting", "built_in", "method"),
    [
        ("padding", "max_len", "gathered_rows(self, real_rows)"),
        ("routing", "least_tokens", "choose(self, ranks, demand)"),
    ],
)
def test_a_policy_that_raises_is_the_run_s_error(
    lab: Path, tmp_path: Path, setting: str, built_in: str, method: str
) -> None:
    """Even one that would leave the program; the other points are run."""
    (lab / "own.py").write_text(f"import sys\nclass Own:\n def {method}:\n  sys.exit('no')")
    text, grid = TOML.partition("skew")[0], f"engine.{setting} = ['own.py:Own', '{built_in}']"
    (lab / "own.toml").write_text(f"{text}[grid]\n{grid}\n")
    assert main(["experiment", str(lab / "own.toml"), "--out", str(tmp_path / "out")]) == 1
    bad, good = rows_of(tmp_path / "out")
    assert good["error"] == ""
    place = f"{setting}: Own: SystemExit: no ({lab}/own.py, line 4 in {method.partition('(')[0]})"
    assert bad["error"].startswith("PolicyFailed: ")
    assert bad["error"].endswith(place)


def test_a_run_of_which_no_step_is_left_says_why(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where all ranks are lost in the first step of every epoch."""
    directory = next((lab / "out" / "runs").iterdir())
    records = [
        replace(record, arrivals=(), error="RankFailed: rank 0: KeyError: 'boom'")
        for record in read_requests(directory)
    ]
    recording = replace(read_recording(directory), steps=())
    module = sys.modules[run_experiment.__module__]
    monkeypatch.setattr(module, "_served", lambda *_: (records, recording))
    outcome = run_experiment(Experiment.from_file(lab / "padding.toml"), tmp_path / "out")
    assert (outcome.runs, outcome.failed) == (2, 2)
    expected = "no request was answered: RankFailed: rank 0: KeyError: 'boom'"
    assert {row["error"] for row in rows_of(tmp_path / "out")} == {expected}


def test_ctrl_c_leaves_a_directory_that_goes_on(
    lab: Path,
    tmp_path: Path,
    served: list[Run],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = sys.modules[run_experiment.__module__]
    serve = vars(module)["_served"]

    def interrupted(experiment: Experiment, run: Run) -> Any:
        if served:
            raise KeyboardInterrupt
        return serve(experiment, run)

    arguments = ["experiment", str(lab / "padding.toml"), "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(module, "_served", interrupted)
        assert main(arguments) == 130
    assert "--resume --out" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "out")) == 1
    assert main([*arguments, "--resume"]) == 0
    assert len(rows_of(tmp_path / "out")) == 2
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert report.count('class="run"') == 2, "one for each point"
    assert len({run.name for run in served}) == len(served) == 2


def test_a_dry_run_lists_points_and_starts_nothing(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["experiment", str(lab / "padding.toml"), "--dry-run", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("engine.padding=max_len: 6 requests, 57 prompt and 24 output tokens")
    assert lines[0].endswith("by rank 0: 3")
    assert lines[-1] == "2 points, 1 times each: 2 runs"
    assert not out.exists()
    assert main(["experiment", str(tmp_path / "none.toml")]) == 2


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("max_model_len = 64", "max_model_len = 17", "engine.padding=max_len: workload: 18 is not"),
        ("max_model_len = 64", "max_model_len = 9999", "max_model_len: 9999 is not allowed"),
        ("page_size = 16", "max_queued_requests = 1", "workload: 3 is not allowed; at most 1 req"),
        ('"model"', '"./none"', "model: '/.*/none' is not allowed; an existing directory"),
        ('"thread"\nmax_model_len = 64', '"ray"\nmax_model_len = 17', "workload: 18 is not"),
        ("64", '17\nmoe_backend = "triton"', "moe_backend: 'triton' is not allowed"),
    ],
)
def test_a_dry_run_refuses_what_a_run_would(
    lab: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, message: str
) -> None:
    assert TOML.count(before) == 1
    text = TOML.replace(before, after).replace("poisson", "all_at_once").replace(", rate = 200", "")
    (lab / "refused.toml").write_text(text)
    assert main(["experiment", str(lab / "refused.toml"), "--dry-run"]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_dry_run_looks_at_the_directory(lab: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["experiment", str(lab / "padding.toml"), "--dry-run", "--out", str(lab / "out")]
    assert main(arguments) == 2
    assert "a new directory, or --resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize("out", ["padding.toml", "padding.toml/below"])
def test_results_are_not_written_into_a_file(
    lab: Path, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    arguments = ["experiment", str(lab / "padding.toml"), "--out", str(lab / out)]
    for more in (["--dry-run"], []):
        assert main([*arguments, *more]) == 2
        assert "a directory (" in capsys.readouterr().err
