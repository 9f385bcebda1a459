"""Waiting for the requests of a replay."""

from __future__ import annotations

from itertools import count

import pytest

from dp_runtime.core.request import FinishReason, RequestUpdate
from dp_runtime.errors import RankFailed, RequestFailed
from dp_runtime.experiments.replay.device.outputs import Outputs
from dp_runtime.metrics.progress_bar import ProgressBar

BAR = ProgressBar("replay", 2, "request", enabled=False)


def test_tokens_are_collected_until_all_have_ended() -> None:
    outputs = Outputs([1, 2])
    hear = outputs.listeners.on_progress
    hear(0, [RequestUpdate(1, 0, (5,)), RequestUpdate(2, 0, (7,), finish_reason=FinishReason.STOP)])
    hear(0, [RequestUpdate(1, 1, (6,), finish_reason=FinishReason.LENGTH)])
    outputs.wait(0.01, lambda: 0, BAR)
    assert outputs.tokens == {1: [5, 6], 2: [7]}


def test_silence_ends_the_wait_once_no_step_is_made_either() -> None:
    steps = count()
    asked: list[int] = []

    def last_step() -> int:
        asked.append(min(next(steps), 2))
        return asked[-1]

    with pytest.raises(RankFailed, match=r"no step for 0\.01 s"):
        Outputs([1]).wait(0.01, last_step, BAR)
    assert asked == [0, 1, 2, 2]


def test_a_failure_of_a_rank_or_of_a_request_ends_the_wait() -> None:
    lost, failed = Outputs([1]), Outputs([1, 2])
    lost.listeners.on_failure(RankFailed("rank 1 is lost"))
    with pytest.raises(RankFailed, match="rank 1 is lost"):
        lost.wait(0.01, lambda: 0, BAR)
    failed.listeners.on_progress(0, [RequestUpdate.failed(2, 0, "no room")])
    with pytest.raises(RequestFailed, match="request 2: no room"):
        failed.wait(0.01, lambda: 0, BAR)
