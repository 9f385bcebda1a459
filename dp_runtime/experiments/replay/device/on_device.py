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
    RecordedStep,
    measured_steps,
    recorded_config,
    recorded_depth,
    recorded_steps,
)
from dp_runtime.experiments.replay.settings import REROUTES, SCHEDULES
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
    config = recorded_config(recording, **changes)
    made = Requests(recording, recorded_depth(recording))
    if set(changes).isdisjoint((*REROUTES, *SCHEDULES)):
        everything, config = recording.with_warm_up, _with_pages(config, recording)
        requests, steps = recorded_requests(everything), recorded_steps(everything)
        first = min(step.step_id for step in recording.steps) - steps[0].traces[0].step_id
        runs = [
            replay_at_steps(config, requests, made, show_progress).since(LEAD + first)
            for _ in range(repeats)
        ]
        same = Sameness.of_steps(steps, recorded_steps(runs[0].whole))
    else:
        allowed = "1 where requests come at their times: steps of replays are no longer the same"
        require(repeats == 1, "repeats", repeats, allowed)
        requests = recorded_requests(recording)
        reroutes = not set(changes).isdisjoint(REROUTES)
        runs = [replay_at_times(config, requests, made, reroutes, show_progress)]
        same = Sameness(0, 0, 0, 0, 0)
    same += Sameness.of_tokens(recording.tokens, runs[0].outputs)
    return _measured(runs, changes, costs, same)


def _with_pages(config: EngineConfig, recording: Recording) -> EngineConfig:
    """Give ranks the pages that they had, and the null page."""
    return replace(config, num_pages=recording.model.cache_tokens // config.page_size + 1)


def _measured(
    runs: Sequence[Replayed], changes: Mapping[str, Any], costs: CostModel, same: Sameness
) -> OnDevice:
    shapes, _ = measured_steps(runs[0].recording)
    seconds = _median_seconds([recorded_steps(run.recording) for run in runs])
    given = ", ".join(f"{name}={value}" for name, value in changes.items())
    line = Line.of(f"{given}, measured", shapes, seconds)
    return OnDevice(line, FitError.of(shapes, [costs(shape) for shape in shapes], seconds), same)


def _median_seconds(runs: Sequence[Sequence[RecordedStep]]) -> list[float]:
    """Return the median time of each step of the first run, over all that have it."""
    seconds: dict[int, list[float]] = defaultdict(list)
    for steps in runs:
        for step in steps:
            seconds[step.traces[0].step_id].append(step.seconds)
    return [median(seconds[step.traces[0].step_id]) for step in runs[0]]
