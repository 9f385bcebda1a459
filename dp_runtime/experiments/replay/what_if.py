"""What a recorded run would have been under other settings, beside what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dp_runtime.errors import require
from dp_runtime.experiments.replay.cost_model import CostModel, FitError
from dp_runtime.experiments.replay.device.on_device import OnDevice
from dp_runtime.experiments.replay.lines import Line, table
from dp_runtime.experiments.replay.recorded_requests import recorded_requests
from dp_runtime.experiments.replay.recorded_steps import (
    execution_of,
    measured_steps,
    recorded_config,
    recorded_depth,
    recorded_steps,
    replay_rows,
    unmeasured_cost,
)
from dp_runtime.experiments.replay.settings import CHANGES, REROUTES, SAME_ROWS
from dp_runtime.experiments.replay.simulator import Simulation
from dp_runtime.experiments.replay.step_shape import StepShape
from dp_runtime.metrics.recording import Recording
from dp_runtime.startup.step_policies import StepPolicies


@dataclass(frozen=True)
class WhatIf:
    lines: tuple[Line, ...]  # as it was, as predicted, and as predicted with changes
    costs: CostModel
    error: FitError
    held_out: bool  # the error is of a run that the costs were not fitted to
    on_device: OnDevice | None = None

    def __str__(self) -> str:
        of = "a run that it was not fitted to" if self.held_out else "the run that it was fitted to"
        parts = [f"costs: {self.costs}", f"for {of}: {self.error}"]
        lines = list(self.lines)
        if self.on_device is not None:
            lines.append(self.on_device.line)
            parts.append(str(self.on_device))
        return "\n".join([table(lines), *parts])

    def to_json(self) -> dict[str, Any]:
        return {
            "lines": [asdict(line) for line in self.lines],
            "costs_s": dict(self.costs.seconds),
            "error": asdict(self.error),
            "held_out": self.held_out,
            "on_device": None if self.on_device is None else self.on_device.to_json(),
        }


def what_if(
    recording: Recording, changes: Mapping[str, Any], fit: Sequence[Recording] = (),
    link_gbps: float | None = None,
) -> WhatIf:  # fmt: skip
    """Predict the steps of a run with some of CHANGES; ValueError where that can't be told.

    fit: runs that costs are fitted to, else this one. link_gbps: gigabits that a rank gets from
    others each second, in place of what was fitted.
    """
    unknown = set(changes) - set(CHANGES)
    require(not unknown, "replay: changes", sorted(unknown), f"some of {', '.join(CHANGES)}")
    shapes, measured = measured_steps(recording)
    fitted = [measured_steps(each) for each in fit] or [(shapes, measured)]
    costs = CostModel.fit(
        [shape for some, _ in fitted for shape in some], [s for _, some in fitted for s in some]
    )
    predicted = [costs(shape) for shape in shapes]
    lines = [
        Line.of("recorded, measured", shapes, measured),
        Line.of("recorded, predicted", shapes, predicted),
    ]
    other = costs if link_gbps is None else costs.with_wire(_wire_s(recording, link_gbps))
    if changes or link_gbps is not None:
        anew, seconds = _changed(recording, changes, other)
        link = {} if link_gbps is None else {"link_gbps": link_gbps}
        name = ", ".join(f"{name}={value}" for name, value in ({**changes, **link}).items())
        lines.append(Line.of(name, anew, seconds))
    return WhatIf(tuple(lines), other, FitError.of(shapes, predicted, measured), bool(fit))


def _changed(
    recording: Recording, changes: Mapping[str, Any], costs: CostModel
) -> tuple[list[StepShape], list[float]]:
    config, steps = recorded_config(recording, **changes), recorded_steps(recording)
    if set(changes) <= set(SAME_ROWS):
        agreements = replay_rows(recording, steps, config)
        shapes = [step.shape(agreed) for step, agreed in zip(steps, agreements, strict=True)]
        return shapes, [costs(shape) for shape in shapes]
    depth, requests = recorded_depth(recording), recorded_requests(recording)
    budget = StepPolicies.by(config, depth, unmeasured_cost).budget
    simulation = Simulation(
        config, recording.model, execution_of(recording, config), budget, depth,
        reroutes=not set(changes).isdisjoint(REROUTES), predict=costs,
    )  # fmt: skip
    anew = simulation.run(requests)
    return [step.shape for step in anew], [step.seconds for step in anew]


def _wire_s(recording: Recording, link_gbps: float) -> float:
    """Seconds that a row takes to one rank, in all layers and both directions."""
    require(link_gbps > 0, "link_gbps", link_gbps, "above 0")
    passes = [
        (each.wire_rows, sum(each.gathered_rows) * (len(each.real_rows) - 1))
        for step in recording.steps
        for each in step.passes
        if each.wire_rows and sum(each.gathered_rows) and len(each.real_rows) > 1
    ]
    require(bool(passes), "link_gbps", link_gbps, "None for a run in which no row left its rank")
    exchanges = max(rows / once for rows, once in passes)
    config = recorded_config(recording)
    itemsize = 4 if config.dtype == "float32" or config.device == "cpu" else 2
    return exchanges * recording.model.hidden_size * itemsize * 8 / (link_gbps * 1e9)
