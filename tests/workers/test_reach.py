"""What is asked of all ranks, of which some do not answer."""

from __future__ import annotations

from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from dp_runtime.errors import RankFailed
from workers.supervision import reach


def step_of(step_id: int) -> Any:
    return SimpleNamespace(step_id=step_id, dp_rank=0)


def test_a_trace_is_of_the_ranks_that_answer(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reach, "STATUS_S", 0.05)
    answered, lost, silent = Future[Any](), Future[Any](), Future[Any]()
    first, second = (step_of(step) for step in (1, 2))
    answered.set_result((second, first))
    lost.set_exception(RankFailed("the process of rank 1 ended (SIGKILL)"))
    seats = [
        SimpleNamespace(dp_rank=rank, call=lambda message, own=answer: own)
        for rank, answer in enumerate((answered, lost, silent))
    ]
    ranks: Any = SimpleNamespace(seats=seats)
    assert reach.trace_of_all(ranks) == (first, second)
    assert [record.args for record in caplog.records] == [(1,), (2,)]
