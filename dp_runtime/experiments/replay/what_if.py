"""What a recorded run would have been under other settings, beside what it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dp_runtime.errors import require
from dp_runtime.experiments.replay.cost_model import CostModel, FitError
from dp_runtime.experiments.replay.recorded_requests import recorded_requests
from dp_runtime.experiments.replay.recorded_steps import (
    RecordedStep,
    execution_of,
    recorded_config,
    recorded_depth,
    recorded_steps,
    replay_rows,
    unmeasured_cost,
)
from dp_runtime.experiments.replay.simulator import Simulation
from dp_runtime.experiments.replay.step_shape import StepShape, padding_waste, row_balance
from dp_runtime.metrics.recording import Recording
from dp_runtime.startup.step_policies import StepPolicies

SAME_ROWS = ("padding",)  # settings that leave each step the rows that it had
REROUTES = ("routing", "dp_size")
SCHEDULES = ("prefill_budget", "max_step_ms", "max_num_requests", "max_num_tokens")
CHANGES = (*SAME_ROWS, *REROUTES, *SCHEDULES)


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    steps: int
    total_s: float  # of all steps, without pauses between them
    step_ms_p50: float
    step_ms_p99: float
    rows_per_step: float  # real, of all ranks
    padding_waste: float
    row_balance: float

    @classmethod
    def of(cls, name: str, shapes: Sequence[StepShape], seconds: Sequence[float]) -> Line:
        p50, p99 = np.percentile(np.array(seconds) * 1e3, (50, 99)).tolist()
        rows = sum(shape.real_rows for shape in shapes) / len(shapes)
        waste, balance = padding_waste(shapes), row_balance(shapes)
        return cls(name, len(shapes), sum(seconds), p50, p99, rows, waste, balance)


@dataclass(frozen=True)
class WhatIf:
    lines: tuple[Line, ...]  # as it was, as predicted, and as predicted with changes
    costs: CostModel
    error: FitError
    held_out: bool  # the error is of a run that the costs were not fitted to

    def __str__(self) -> str:
        names = ["", "steps", "total s", "p50 ms", "p99 ms", "rows/step", "waste", "balance"]
        cells = [names, *(_cells(line) for line in self.lines)]
        widths = [max(map(len, column)) for column in zip(*cells)]
        table = "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in cells
        )
        of = "a run that it was not fitted to" if self.held_out else "the run that it was fitted to"
        return f"{table}\ncosts: {self.costs}\nfor {of}: {self.error}"

    def to_json(self) -> dict[str, Any]:
        return {
            "lines": [asdict(line) for line in self.lines],
            "costs_s": dict(self.costs.seconds),
            "error": asdict(self.error),
            "held_out": self.held_out,
        }


def _cells(line: Line) -> list[str]:
    return [
        line.name, str(line.steps), f"{line.total_s:.3f}", f"{line.step_ms_p50:.3f}",
        f"{line.step_ms_p99:.3f}", f"{line.rows_per_step:.1f}", f"{line.padding_waste:.1%}",
        f"{line.row_balance:.1%}",
    ]  # fmt: skip


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
    steps = recorded_steps(recording)
    shapes, measured = _measured(recording, steps)
    fitted = [_measured(each, recorded_steps(each)) for each in fit] or [(shapes, measured)]
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
        anew, seconds = _changed(recording, steps, changes, other)
        link = {} if link_gbps is None else {"link_gbps": link_gbps}
        name = ", ".join(f"{name}={value}" for name, value in ({**changes, **link}).items())
        lines.append(Line.of(name, anew, seconds))
    return WhatIf(tuple(lines), other, FitError.of(predicted, measured), bool(fit))


def _measured(
    recording: Recording, steps: Sequence[RecordedStep]
) -> tuple[list[StepShape], list[float]]:
    agreements = replay_rows(recording, steps, recorded_config(recording))
    shapes = [step.shape(agreed) for step, agreed in zip(steps, agreements, strict=True)]
    return shapes, [step.seconds for step in steps]


def _changed(
    recording: Recording, steps: Sequence[RecordedStep], changes: Mapping[str, Any],
    costs: CostModel,
) -> tuple[list[StepShape], list[float]]:  # fmt: skip
    config = recorded_config(recording, **changes)
    if set(changes) <= set(SAME_ROWS):
        agreements = replay_rows(recording, steps, config)
        shapes = [step.shape(agreed) for step, agreed in zip(steps, agreements, strict=True)]
        return shapes, [costs(shape) for shape in shapes]
    depth = recorded_depth(recording)
    budget = StepPolicies.by(config, depth, unmeasured_cost).budget
    simulation = Simulation(
        config, recording.model, execution_of(recording, config), budget, depth,
        reroutes=not set(changes).isdisjoint(REROUTES), predict=costs,
    )  # fmt: skip
    anew = simulation.run(recorded_requests(steps))
    return [step.shape for step in anew], [step.seconds for step in anew]


def _wire_s(recording: Recording, link_gbps: float) -> float:
    """Seconds that a row takes to one rank, in all layers and both directions."""
    require(link_gbps > 0, "link_gbps", link_gbps, "above 0")
    passes = [
        (each.wire_rows, sum(each.gathered_rows) * (len(each.real_rows) - 1))
        for step in recording.steps
        for each in step.passes
        if each.wire_rows
    ]
    require(bool(passes), "link_gbps", link_gbps, "None for a run in which no row left its rank")
    exchanges = max(rows / once for rows, once in passes)
    config = recording.config
    itemsize = 4 if config["dtype"] == "float32" or config["device"] == "cpu" else 2
    return exchanges * recording.model.hidden_size * itemsize * 8 / (link_gbps * 1e9)
