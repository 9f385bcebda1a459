"""Scenarios: what they say to ranks, what is refused, and what comes of them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.experiments import Experiment, read_requests, read_steps, run_experiment
from dp_runtime.experiments.measurement.figures import figures_of
from dp_runtime.experiments.slo import Slo
from tests.checkpoints import tiny_checkpoint

ENGINE: dict[str, Any] = {
    "model": "./model", "dp_size": 3, "device": "cpu", "launcher": "thread", "max_model_len": 64,
    "page_size": 16,
}  # fmt: skip
WORKLOAD = {
    "num_requests": 12,
    "prompts": {"kind": "fixed", "tokens": 6},
    "outputs": {"kind": "fixed", "tokens": 24},
}


def made(home: Path = Path("/lab"), **tables: Any) -> Experiment:
    base = {"engine": ENGINE, "workload": WORKLOAD, "warm_up_requests": 0, "repeats": 1}
    return Experiment.from_document(base | tables, home)


def test_events_of_ranks_become_faults_beside_those_of_the_engine() -> None:
    scenario = {
        "slow": {"kind": "straggler", "rank": 1, "at_step": 4, "until_step": 9, "ms": 20},
        "late": {"kind": "pause", "rank": 0, "at_s": 1.5, "seconds": 0.5},
    }
    engine = ENGINE | {"inject": "rank=2,step=1,kind=slow,seconds=1"}
    grid = {"scenario.slow.ms": [20, 0]}
    slow, well = made(scenario=scenario, engine=engine, grid=grid).points
    own, late = engine["inject"], "rank=0,after_s=1.5,kind=slow,seconds=0.5"
    assert slow.config.inject == f"{own};rank=1,step=4,kind=slow,seconds=0.02,until=9;{late}"
    assert well.config.inject == f"{own};{late}"


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"kind": "fire"}, "^scenario.a.kind: 'fire' is not allowed; one of straggler, pause"),
        ({"kind": "kill", "rank": 0}, "^scenario.a.at_step: None is not allowed; either"),
        ({"kind": "kill", "rank": 0, "at_step": 1, "at_s": 1}, "^scenario.a.at_step: 1 is not"),
        ({"kind": "kill", "rank": 0, "at_step": 1}, "^scenario.a.inject: kind: 'kill' .* thread"),
        ({"kind": "pause", "rank": 3, "at_s": 1, "seconds": 1}, "^scenario.a.inject: rank: '3'"),
        ({"kind": "straggler", "rank": 1, "at_s": 1, "ms": 1}, "^scenario.a.until_step: None"),
        ({"kind": "drain", "rank": 3, "at_s": 1}, "^scenario.a.rank: 3 .* several ranks, 0..2"),
        ({"kind": "resize", "dp_size": 0, "at_s": 1}, "^scenario.a.dp_size: 0 is not allowed"),
        ({"kind": "resize", "at_s": 1}, "^scenario.a.dp_size: None is not allowed; it is needed"),
    ],
)  # fmt: skip
def test_a_scenario_is_checked_before_anything_starts(event: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(scenario={"a": event})


def test_a_scenario_needs_a_load_that_fits_it() -> None:
    slow = {"kind": "straggler", "rank": 1, "at_step": 0, "until_step": 9, "ms": 20}
    with pytest.raises(ValueError, match=r"^warm_up_requests: 2 is not allowed; 0 with events"):
        made(scenario={"slow": slow}, warm_up_requests=2)
    drain = {"kind": "drain", "rank": 1, "at_s": 0.1}
    with pytest.raises(ValueError, match=r"^workload.skew: 'pinned' .* routed, where ranks come"):
        made(scenario={"out": drain}, workload=WORKLOAD | {"skew": {"kind": "zipf"}})
    twice = {"out": drain, "again": drain | {"at_s": 0.2}}
    with pytest.raises(ValueError, match=r"^scenario.again.rank: 1 .* several ranks, 0, 2"):
        made(scenario=twice)


@pytest.mark.slow
def test_who_is_slow_is_busy_and_who_is_drained_serves_no_more(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    scenario = {
        "slow": {"kind": "straggler", "rank": 1, "at_step": 0, "until_s": 60, "ms": 30},
        "out": {"kind": "drain", "rank": 2, "at_step": 8},
    }
    outcome = run_experiment(made(tmp_path, scenario=scenario), tmp_path / "out")
    assert (outcome.runs, outcome.failed) == (1, 0)
    run = next((tmp_path / "out" / "runs").iterdir())
    records, steps = read_requests(run), read_steps(run)
    assert [record.output_tokens for record in records] == [24] * 12
    first = [step for step in steps if step.epoch == 0 and step.step_id <= 8]
    starts = [step.start_s for step in first if step.passes[0].max_rows and step.dp_rank == 1]
    assert len(starts) > 4
    assert all(after - before >= 0.03 for before, after in pairwise(starts))
    assert {step.dp_rank for step in steps if step.epoch == 1} == {0, 1}
    figures = figures_of(records, steps, Slo())
    assert figures["recoveries"] == 1
    assert (figures["recovery_s"] or 0) > 0


@pytest.mark.slow
def test_who_is_killed_is_replaced_and_no_request_fails(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "model")
    scenario = {"kill": {"kind": "kill", "rank": 1, "at_step": 5}}
    experiment = made(tmp_path, scenario=scenario, engine=ENGINE | {"launcher": "local"})
    assert run_experiment(experiment, tmp_path / "out").failed == 0
    run = next((tmp_path / "out" / "runs").iterdir())
    assert [record.output_tokens for record in read_requests(run)] == [24] * 12
    assert figures_of(read_requests(run), read_steps(run), Slo())["recoveries"] == 1
