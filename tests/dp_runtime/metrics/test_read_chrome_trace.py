"""A trace that was written is read as the steps that it was written of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.metrics.chrome_trace import chrome_trace
from dp_runtime.metrics.read_chrome_trace import read_chrome_trace
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.trace import PassTrace, StepTrace
from tests.dp_runtime.experiments.report.runs import make_steps

SECONDS = ("schedule_s", "agree_s", "agree_wait_s", "prepare_s", "sample_s", "commit_s", "encode_s")
PASS_SECONDS = ("forward_s", "wait_s", "prepare_s")


def exact(step: StepTrace) -> StepTrace:
    """Leave out times, which are rounded and begin at 0."""
    still: dict[str, Any] = dict.fromkeys(
        (*SECONDS, "start_s", "sample_start_s", "commit_start_s"), 0.0
    )
    passes = tuple(
        replace(one, forward_s=0.0, wait_s=0.0, start_s=0.0, prepare_s=0.0) for one in step.passes
    )
    return replace(step, passes=passes, **still)


def test_steps_are_read_again(tmp_path: Path) -> None:
    steps = make_steps(6)
    draft = PassTrace("draft (2)", (1, 2), (2, 2), 3, 0.0001, 0.0, "graph", steps[3].start_s)
    waiting = replace(steps[3], agree_wait_s=0.001, passes=(draft, *steps[3].passes), position=1)
    steps[3] = replace(
        waiting, num_drafts=0, accepted=(), num_preemptions=3, num_images=2, encode_s=0.01
    )
    ranks = [RankHealth(rank, RankState.IDLE, pid=9, host="a") for rank in (0, 1)]
    text = "".join(chrome_trace(steps, ranks))
    (tmp_path / "trace.json").write_text(text, encoding="utf-8")
    found = read_chrome_trace(tmp_path / "trace.json")
    assert [exact(step) for step in found] == [exact(step) for step in steps]
    for one, other in zip(found, steps):
        assert one.start_s == pytest.approx(other.start_s - 100, abs=1e-8)
        for name in SECONDS:
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-8), name
        for again, written in zip(one.passes, other.passes):
            for name in PASS_SECONDS:
                assert getattr(again, name) == pytest.approx(getattr(written, name), abs=1e-8), name
