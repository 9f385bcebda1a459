"""OnDevice: a recorded run on real ranks, under its own settings or under others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.experiments.replay.cost_model import CostModel, FitError
from dp_runtime.experiments.replay.device.ranks import Replayed, replay_at_steps, replay_at_times
from dp_runtime.experiments.replay.device.requests import Requests
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
    steps = recorded_steps(recording)
    requests, made = recorded_requests(steps), Requests(recording, recorded_depth(recording))
    config = recorded_config(recording, **changes)
    timed = not set(changes).isdisjoint((*REROUTES, *SCHEDULES))
    if timed:
        reroutes = not set(changes).isdisjoint(REROUTES)
        replayed = replay_at_times(config, requests, made, reroutes, show_progress)
    else:
        pages = _with_pages(config, recording)
        replayed = replay_at_steps(pages, requests, made, show_progress)
    anew = recorded_steps(replayed.recording)
    same = Sameness.of_tokens(recording.tokens, replayed.outputs)
    if not timed:
        same += Sameness.of_steps(steps, anew)
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
