"""OnDevice: a recorded run on real ranks, under its own settings or under others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dp_runtime.config import EngineConfig
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
    recording: Recording, changes: Mapping[str, Any], costs: CostModel, show_progress: bool = False
) -> OnDevice:
    """Serve the recorded requests anew, with some settings changed, among them the device.

    Requests come in their recorded steps, to their recorded ranks. Where changes give steps other
    rows (REROUTES, SCHEDULES) they come at their recorded times, and routing chooses their ranks
    if it is among what changes.
    """
    config = recorded_config(recording, **changes)
    made, everything = Requests(recording, recorded_depth(recording)), recording.with_warm_up
    if set(changes).isdisjoint((*REROUTES, *SCHEDULES)):
        requests, steps = recorded_requests(everything), recorded_steps(everything)
        config = _with_pages(config, recording)
        whole = replay_at_steps(config, requests, made, show_progress)
        same = Sameness.of_steps(steps, recorded_steps(whole.recording))
        first = min(step.step_id for step in recording.steps) - steps[0].traces[0].step_id
        replayed = whole.since(LEAD + first)
    else:
        requests = recorded_requests(recording)
        reroutes = not set(changes).isdisjoint(REROUTES)
        replayed = replay_at_times(config, requests, made, reroutes, show_progress)
        same = Sameness(0, 0, 0, 0, 0)
    same += Sameness.of_tokens(recording.tokens, replayed.outputs)
    return _measured(replayed, changes, costs, same)


def _with_pages(config: EngineConfig, recording: Recording) -> EngineConfig:
    """Give ranks the pages that they had, and the null page."""
    return replace(config, num_pages=recording.model.cache_tokens // config.page_size + 1)


def _measured(
    replayed: Replayed, changes: Mapping[str, Any], costs: CostModel, same: Sameness
) -> OnDevice:
    shapes, seconds = measured_steps(replayed.recording)
    given = ", ".join(f"{name}={value}" for name, value in changes.items())
    line = Line.of(f"{given}, measured", shapes, seconds)
    return OnDevice(line, FitError.of(shapes, [costs(shape) for shape in shapes], seconds), same)
