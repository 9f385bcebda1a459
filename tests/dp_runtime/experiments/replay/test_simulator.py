"""Recorded requests scheduled anew: as it was, and by other policies."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dp_runtime.experiments.replay.recorded_requests import RecordedRequest, recorded_requests
from dp_runtime.experiments.replay.recorded_steps import (
    execution_of,
    recorded_config,
    recorded_depth,
    recorded_steps,
)
from dp_runtime.experiments.replay.simulator import SimulatedStep, Simulation
from dp_runtime.metrics.recording import Recording
from dp_runtime.parallel.prefill_budget import no_budget


def simulated(
    recording: Recording,
    requests: Sequence[RecordedRequest],
    reroutes: bool = False,
    **changes: object,
) -> list[SimulatedStep]:
    config = recorded_config(recording, **changes)
    execution, depth = execution_of(recording, config), recorded_depth(recording)
    simulation = Simulation(config, recording.model, execution, no_budget, depth, reroutes)
    return simulation.run(requests)


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_under_the_same_policies_are_those_of_the_ranks(
    recordings: dict[bool, Recording], overlap: bool
) -> None:
    recording = recordings[overlap]
    steps = recorded_steps(recording)
    assert recorded_depth(recording) == overlap
    anew = simulated(recording, recorded_requests(recording))
    assert len(anew) == len(steps)
    for step, other in zip(steps, anew):
        assert [plan.padding.real_rows for plan in other.shape.plans] == [
            real for _, real, _ in step.plans
        ]
        assert [plan.padding.gathered_rows for plan in other.shape.plans] == [
            gathered for _, _, gathered in step.plans
        ]
        for record, simulated_record in zip(step.records, other.shape.records):
            assert record.prefill_rows == simulated_record.prefill_rows
            assert record.num_sampling == simulated_record.num_sampling
