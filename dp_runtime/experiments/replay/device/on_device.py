"""OnDevice: a recorded run on real ranks, under its own settings or under others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.errors import require
from dp_runtime.experiments.replay.cost_model import CostModel, FitError
from dp_runtime.experiments.replay.device.ranks import Replayed, replay_at_steps, replay_at_times
from dp_runtime.experiments.replay.device.requests import LEAD, Requests
from dp_runtime.experiments.replay.device.sameness import Sameness
from dp_runtime.experiments.replay.lines import Line
from dp_runtime.experiments.replay.recorded_requests import recorded_requests
from dp_runtime.experiments.replay.recorded_steps import (
    measured_steps,
    recorded_config,
    recorded_depth,
    recorded_steps,
)
from dp_runtime.experiments.replay.settings import REROUTES, SCHEDULES
from dp_runtime.experiments.replay.step_shape import StepShape
from dp_runtime.metrics.recording import Recording


@dataclass(frozen=True)
class OnDevice:
    line: Line  # as measured
    error: FitError  # of what costs predict for its steps
    same: Sameness

    def __str__(self) -> str:
        return f"{self.line.name}: {self.same}\nfor its steps: {self.error}"

    def to_json(self) -> dict[str, Any]:
        return {"line": asdict(self.line), "error": asdict(self.error), "same": asdict(self.same)}


def replay_on_device(
    recording: Recording, changes: Mapping[str, Any], costs: CostModel, repeats: int = 1,
    show_progress: bool = False,
) -> OnDevice:  # fmt: skip
    """Serve the recorded requests anew, with some settings changed, among them the device.

    Requests come in their recorded steps, to their recorded ranks. Where changes give steps other
    rows (REROUTES, SCHEDULES) they come at their recorded times, and routing chooses their ranks
    if it is among what changes. repeats: each step's time is the median of so many replays.
    """
    require(repeats >= 1, "repeats", repeats, "1 or more")
    if set(changes).isdisjoint((*REROUTES, *SCHEDULES)):
        runs = [replay_same_rows(recording, changes, show_progress) for _ in range(repeats)]
        steps = recorded_steps(recording.with_warm_up)
        same = Sameness.of_steps(steps, recorded_steps(runs[0].whole))
    else:
        allowed = "1 where requests come at their times: steps of replays are no longer the same"
        require(repeats == 1, "repeats", repeats, allowed)
        config, requests = recorded_config(recording, **changes), recorded_requests(recording)
        made = Requests(recording, recorded_depth(recording))
        reroutes = not set(changes).isdisjoint(REROUTES)
        runs = [replay_at_times(config, requests, made, reroutes, show_progress)]
        same = Sameness(0, 0, 0, 0, 0)
    same += Sameness.of_tokens(recording.tokens, runs[0].outputs)
    return _measured(runs, changes, costs, same)


def replay_same_rows(
    recording: Recording, changes: Mapping[str, Any], show_progress: bool = False
) -> Replayed:
    """Have ranks run the recorded steps again, once."""
    everything, depth = recording.with_warm_up, recorded_depth(recording)
    config = _with_pages(recorded_config(recording, **changes), recording)
    requests, made = recorded_requests(everything), Requests(recording, depth)
    first = min(step.step_id for step in recording.steps)
    begin = min(step.step_id for step in everything.steps)
    return replay_at_steps(config, requests, made, show_progress).since(LEAD + first - begin)


def _with_pages(config: EngineConfig, recording: Recording) -> EngineConfig:
    """Give ranks the pages that they had, and the null page."""
    return replace(config, num_pages=recording.model.cache_tokens // config.page_size + 1)


def _measured(
    runs: Sequence[Replayed], changes: Mapping[str, Any], costs: CostModel, same: Sameness
) -> OnDevice:
    shapes, seconds = median_steps(runs)
    given = ", ".join(f"{name}={value}" for name, value in changes.items())
    line = Line.of(f"{given}, measured", shapes, seconds)
    return OnDevice(line, FitError.of(shapes, [costs(shape) for shape in shapes], seconds), same)


def median_steps(runs: Sequence[Replayed]) -> tuple[list[StepShape], list[float]]:
    """Return the sizes of each step of the first run, and its median time in all that have it."""
    seconds: dict[int, list[float]] = defaultdict(list)
    for run in runs:
        for step in recorded_steps(run.recording):
            seconds[step.traces[0].step_id].append(step.seconds)
    shapes, _ = measured_steps(runs[0].recording)
    first = recorded_steps(runs[0].recording)
    return shapes, [median(seconds[step.traces[0].step_id]) for step in first]
