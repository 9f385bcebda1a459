"""How long steps took, by when a device had their tokens."""

from __future__ import annotations

import pytest
import torch

from dp_runtime.core import device_copy
from dp_runtime.core.device_copy import HostCopy
from dp_runtime.runner import step_timer
from dp_runtime.runner.step_timer import StepClock


class Scene:
    """A host and a device at chosen times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.clock = StepClock()

    def copied_at(self, seconds: float) -> HostCopy:
        self._monkeypatch.setattr(device_copy, "perf_counter", lambda: seconds)
        return HostCopy(torch.zeros(1))

    def committed(self, step_id: int, started_s: float, tokens: HostCopy, now_s: float) -> int:
        self._monkeypatch.setattr(step_timer, "perf_counter", lambda: now_s)
        self.clock.committed(step_id, started_s, tokens)
        return self.clock.take_us(step_id)


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(monkeypatch)


def test_a_step_takes_the_time_between_tokens_however_early_it_was_launched(scene: Scene) -> None:
    first, second, third = (scene.copied_at(at) for at in (1.0, 1.5, 1.75))
    assert scene.committed(0, 0.5, first, 1.125) == 625_000, "nothing ran before it"
    assert scene.committed(1, 0.75, second, 1.625) == 500_000
    assert scene.committed(2, 1.25, third, 2.5) == 250_000


def test_time_without_a_step_is_no_part_of_the_next(scene: Scene) -> None:
    scene.committed(0, 0.5, scene.copied_at(1.0), 1.0)
    assert scene.committed(9, 60.0, scene.copied_at(60.25), 60.5) == 500_000


def test_a_time_is_told_once_and_for_a_step_that_ran(scene: Scene) -> None:
    scene.clock.committed(3, 0.0, scene.copied_at(1.0))
    assert scene.clock.take_us(2) == 0
    assert scene.clock.take_us(3) > 0
    assert scene.clock.take_us(3) == 0
