"""The experiments of examples/experiments: they are what they say, and small ones show the same."""

from __future__ import annotations

import csv
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.experiments import Experiment, run_experiment
from dp_runtime.experiments.results.run_files import write_json
from dp_runtime.experiments.results.tables import write_tables
from examples.experiments.figures import SHOWN, bars_of, draw

HOME = Path(__file__).parents[1] / "examples" / "experiments"
FILES = sorted(HOME.glob("*.toml"))
Rows = dict[tuple[str, ...], dict[str, float]]


def test_each_experiment_has_a_file_a_text_and_figures() -> None:
    assert {file.stem for file in FILES} == set(SHOWN)
    text = (HOME / "README.md").read_text(encoding="utf-8")
    for file in FILES:
        experiment = Experiment.from_file(file)
        assert 2 <= len(experiment.points) <= 9
        assert experiment.plan.repeats == 3, "without repeats there is no interval"
        assert f"{file.name}" in text
        assert f"figures/{file.stem}.png" in text
        assert (HOME / "figures" / f"{file.stem}.png").stat().st_size > 10_000


def test_figures_are_drawn_from_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"case": case, "point": case, "repeat": repeat, "error": "", "steps": steps + repeat}
        for case, steps in (("well", 10), ("slow", 20)) for repeat in (0, 2)
    ]  # fmt: skip
    write_tables(tmp_path, rows, ["case"])
    points = {case: {"case": case} for case in ("well", "slow")}
    described = {"name": "straggler", "plan": {"repeats": 2}, "points": points}
    write_json(tmp_path / "run.json", described)
    _, bars = bars_of(tmp_path, "steps")
    assert [(bar.label, bar.mean) for bar in bars] == [("well", 11), ("slow", 21)]
    assert all(bar.low < bar.mean < bar.high for bar in bars)
    assert draw(tmp_path, tmp_path / "figures").stat().st_size > 10_000


def small(name: str, out: Path, varied: list[str], workload: Any = (), **tables: Any) -> Rows:
    """Run an experiment with threads, once for each point; its rows by the grid's values."""
    document = tomllib.loads((HOME / f"{name}.toml").read_text(encoding="utf-8"))
    document["engine"]["launcher"] = "thread"
    document["workload"] |= dict(workload)
    experiment = Experiment.from_document(document | {"repeats": 1, "name": name} | tables, HOME)
    assert run_experiment(experiment, out).failed == 0
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    figures = set(rows[0]) - {*varied, "point", "error"}
    return {
        tuple(Path(row[name]).name for name in varied): {
            figure: float(row[figure]) for figure in figures if row[figure]
        }
        for row in rows
    }


@pytest.mark.slow
def test_padding_grows_with_skew_and_only_where_ranks_pad(tmp_path: Path) -> None:
    outputs = {"outputs": {"kind": "fixed", "tokens": 6}, "num_requests": 16}
    varied = ["engine.padding", "workload.skew.exponent"]
    rows = small("padding_skew", tmp_path / "out", varied, outputs)
    waste = {key: row["padding_waste"] for key, row in rows.items()}
    balance = {key: row["row_balance"] for key, row in rows.items()}
    assert waste["max_len", "0"] < waste["max_len", "1"] < waste["max_len", "2"]
    assert {waste["ragged", exponent] for exponent in "012"} == {0.0}
    assert balance["ragged", "2"] < balance["ragged", "0"]
    for exponent in "012":
        assert waste["my_policy.py:Eights", exponent] >= waste["max_len", exponent] - 0.05


@pytest.mark.slow
def test_routing_by_tokens_balances_groups_and_by_turn_does_not(tmp_path: Path) -> None:
    rows = small("routing_groups", tmp_path / "out", ["engine.routing"], {"length_scale": 0.02})
    tokens, turn = rows["least_tokens",], rows["round_robin",]
    assert tokens["row_balance"] > turn["row_balance"]
    assert tokens["output_tokens"] == turn["output_tokens"]
    first = turn["output_tokens_0"]
    assert first > sum(turn[f"output_tokens_{rank}"] for rank in (1, 2, 3)) / 3 * 2


@pytest.mark.slow
def test_a_straggler_is_hidden_by_its_drain_and_not_by_an_empty_queue(tmp_path: Path) -> None:
    outputs = {"outputs": {"kind": "fixed", "tokens": 30}}
    rows = small("straggler", tmp_path / "out", ["case"], outputs)
    assert rows["no requests there",]["requests_1"] == 0
    for case in ("slow", "no requests there", "drafts"):
        assert rows[case,]["step_ms_p50"] >= 60
    assert rows["drained",]["recoveries"] == 1
    assert "requests_1" not in rows["drained",], "who has left remembers nothing"
    assert rows["drafts",]["steps"] < rows["slow",]["steps"]


@pytest.mark.slow
def test_a_budget_takes_prompts_in_more_steps(tmp_path: Path) -> None:
    load = {"outputs": {"kind": "fixed", "tokens": 12}, "num_requests": 12}
    rows = small("prefill_beside_decode", tmp_path / "out", ["case"], load)
    assert rows["32 tokens",]["steps"] > rows["no budget",]["steps"]


@pytest.mark.slow
def test_drafts_save_steps_and_a_policy_proposes_fewer(tmp_path: Path) -> None:
    varied = ["case", "workload.skew.share"]
    rows = small("speculation_imbalance", tmp_path / "out", varied, {"num_requests": 8})
    for share in ("0.25", "0.85"):
        none, fixed, adaptive, own = (
            rows[case, share] for case in ("none", "fixed 3", "adaptive", "one more or less")
        )
        assert max(fixed["steps"], adaptive["steps"], own["steps"]) < none["steps"]
        assert fixed["tokens_per_verification"] > adaptive["tokens_per_verification"] > 1
        assert own["drafts_proposed"] < fixed["drafts_proposed"]
