"""Ranks are killed, stopped and fail by themselves: no request is lost, and no token changes."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dp_runtime import RequestHandle, SamplingParams
from dp_runtime.core.request import FinishReason
from dp_runtime.errors import RankFailed, RequestFailed
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.serving import check_pages_free
from tests.signals import stop
from tests.workers.disturbed import (
    NUM_REQUESTS,
    WAIT_S,
    Undisturbed,
    alike,
    kill,
    recovering,
    served,
)
from tests.workers.leftovers import wait_until
from tests.workers.test_watch import nothing_left


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("recovery")))


@pytest.mark.parametrize("num_drafts", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_costs_no_request(
    model: Path, undisturbed: Undisturbed, num_drafts: int
) -> None:
    draw = random.Random(num_drafts)
    with (
        nothing_left(),
        recovering(model, "local", speculative_num_steps=num_drafts) as engine,
    ):
        expected = undisturbed(1, num_drafts)
        for epoch in (1, 2):
            victims = draw.sample([rank.pid for rank in engine.health()], epoch)
            assert alike(served(engine, 1, partial(kill, victims))) == expected
            assert {rank.epoch for rank in engine.health()} == {epoch}
            check_pages_free(engine)
        assert engine.report().requests == 2 * NUM_REQUESTS


@pytest.mark.slow
def test_a_stopped_rank_is_replaced_and_disturbs_nobody_later(
    model: Path, undisturbed: Undisturbed
) -> None:
    with nothing_left(), recovering(model, "local") as engine:
        expected = undisturbed(1)
        pid = engine.health()[1].pid
        assert alike(served(engine, 1, lambda: stop(pid))) == expected
        assert engine.health()[1].pid != pid
        check_pages_free(engine)


@pytest.mark.slow
def test_an_idle_engine_replaces_a_rank_too(model: Path, undisturbed: Undisturbed) -> None:
    with nothing_left(), recovering(model, "local") as engine:
        expected = undisturbed(1)
        os.kill(engine.health()[0].pid, signal.SIGKILL)
        wait_until(lambda: {rank.epoch for rank in engine.health()} == {1}, "recovered", WAIT_S)
        assert alike(served(engine, 1, lambda: None)) == expected


def test_what_is_submitted_and_aborted_meanwhile_is_seen_to(model: Path) -> None:
    with nothing_left(), recovering(model, "local") as engine:
        endless = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)
        expected = engine.generate([[5, 6, 7]], endless)[0].token_ids
        doomed = [engine.submit([4, 5], endless, dp_rank=rank) for rank in range(3)]
        next(iter(doomed[1]))
        os.kill(engine.health()[1].pid, signal.SIGKILL)
        for handle in doomed:
            handle.abort()
        added: list[RequestHandle] = []
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            added.append(engine.submit([5, 6, 7], endless, dp_rank=len(added) % 3))
            time.sleep(0.03)
        assert {handle.result(WAIT_S).token_ids for handle in added} == {expected}
        reasons = {handle.result(WAIT_S).finish_reason for handle in doomed}
        assert reasons <= {FinishReason.ABORT, FinishReason.LENGTH}
        check_pages_free(engine)


def test_an_abort_is_answered_before_anybody_notices_that_its_rank_is_lost(model: Path) -> None:
    with nothing_left(), recovering(model, "local", hang_timeout_s=3600.0) as engine:
        endless = SamplingParams(max_tokens=200, ignore_eos=True)
        lost = [engine.submit([4, 5], endless, dp_rank=1) for _ in range(4)]
        next(iter(lost[0]))
        pid = engine.health()[1].pid
        stop(pid)
        for handle in lost[:3]:
            handle.abort()
        ended = [handle.result(WAIT_S) for handle in lost[:3]]
        assert {output.finish_reason for output in ended} <= {
            FinishReason.ABORT,
            FinishReason.LENGTH,
        }
        assert engine._core._group._supervisor.state.epoch == 0  # type: ignore[attr-defined]
        kill([pid])
        assert len(lost[3].result(WAIT_S).token_ids) == 200
        assert [handle.result() for handle in lost[:3]] == ended
        check_pages_free(engine)


class Faulty(threading.Event):
    always = False  # or the next step only


@pytest.fixture
def faulty() -> Iterator[Faulty]:
    """Once set, the next step of some rank raises, of one engine's thread ranks."""
    armed = Faulty()
    from dp_runtime.runner.step_runner import StepRunner

    original = StepRunner.run

    def run(self: StepRunner, scheduled: Any, *agreed: Any) -> Any:
        if armed.is_set() and scheduled.req_indices.size:
            if not armed.always:
                armed.clear()
            raise RuntimeError("the fault of a test")
        return original(self, scheduled, *agreed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StepRunner, "run", run)
        yield armed


def test_a_rank_that_raises_is_replaced(
    model: Path, undisturbed: Undisturbed, faulty: threading.Event
) -> None:
    with recovering(model, "thread") as engine:
        expected = undisturbed(1)
        assert alike(served(engine, 1, faulty.set)) == expected
        assert {rank.epoch for rank in engine.health()} == {1}
        check_pages_free(engine)


def test_no_request_ends_the_engine_however_often_it_comes(
    model: Path, faulty: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its ranks were lost of is put down to it, and counts as no recovery."""
    monkeypatch.setattr("dp_runtime.engine.routing.relocation.MAX_REPLAYS", 1)
    faulty.always = True
    with recovering(model, "thread", dp_size=2, max_recoveries=3) as engine:
        for _ in range(4):
            faulty.set()
            with pytest.raises(RequestFailed, match="2 ranks were lost before it had another"):
                engine.generate([[1, 2]])
        faulty.clear()
        assert len(engine.generate([[1, 2]], SamplingParams(max_tokens=3))[0].token_ids) == 3
        assert {rank.epoch for rank in engine.health()} == {8}


@pytest.mark.slow
def test_faults_without_end_end_the_engine_with_their_history(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dp_runtime.engine.routing.relocation.MAX_REPLAYS", 100)
    with nothing_left(), recovering(model, "local", max_recoveries=2) as engine:
        endless = SamplingParams(max_tokens=250, ignore_eos=True)
        handles = [engine.submit([1, 2], endless) for _ in range(30)]
        for epoch in range(3):
            ready = lambda due=epoch: {rank.epoch for rank in engine.health()} == {due}  # noqa: E731
            wait_until(ready, f"epoch {epoch}", WAIT_S)
            os.kill(engine.health()[2].pid, signal.SIGKILL)
        text = r"recovered within 60 s before: ranks \[2\]"
        wait_until(lambda: engine._core._closed is not None, "the end", WAIT_S)
        with pytest.raises(RankFailed, match=text):
            engine.generate([[1]])
        assert all(handle.done for handle in handles)


@pytest.mark.slow
def test_a_request_that_its_ranks_are_lost_of_fails_alone(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dp_runtime.engine.routing.relocation.MAX_REPLAYS", 0)
    with recovering(model, "local") as engine:
        endless = SamplingParams(max_tokens=200, ignore_eos=True)
        lost, kept = (engine.submit([1, 2], endless, dp_rank=rank) for rank in (1, 0))
        next(iter(lost))
        os.kill(engine.health()[1].pid, signal.SIGKILL)
        with pytest.raises(Exception, match="1 ranks were lost before it had another token"):
            lost.result(WAIT_S)
        assert len(kept.result(WAIT_S).token_ids) == 200
