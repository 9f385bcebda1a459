"""Ranks that are stopped while they start, serve or close, and engines that nobody closes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import pytest

from collectives.session import VARIABLE, session_token
from dp_runtime import Engine, EngineConfig, TokensPrompt
from dp_runtime.errors import EngineClosed, RankFailed, StartError
from tests.signals import stop
from tests.workers.engines import ENDLESS, REPOSITORY, SHORT, TOLD_S, engine
from tests.workers.leftovers import left_overs, nothing_new, rank_processes, wait_until
from workers.supervision.leaving import STOP_S


@pytest.fixture
def frozen() -> Iterator[list[int]]:
    """Processes that a test has stopped, which go on after it, however it ends."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)


def freeze(pids: list[int], frozen: list[int]) -> None:
    for pid in pids:
        frozen.append(pid)
        stop(pid)


@contextmanager
def nothing_left() -> Iterator[None]:
    before = left_overs()
    yield
    wait_until(lambda: nothing_new(before), "nothing is left")


def test_a_single_rank_that_is_stopped_is_named(model: Path, frozen: list[int]) -> None:
    with nothing_left(), engine(model, "local", dp_size=1, step_timeout_s=1.0) as one:
        handle = one.submit([1, 2, 3], ENDLESS)
        freeze([one.health()[0].pid], frozen)
        with pytest.raises(RankFailed, match=r"^rank 0 has not answered for .* s: the process"):
            handle.result(TOLD_S)
        with pytest.raises(RankFailed, match="rank 0 has not answered"):
            one.submit([1])


def test_no_caller_waits_for_a_rank_that_reads_nothing(model: Path, frozen: list[int]) -> None:
    """More than a pipe holds goes to a stopped rank, and the ranks close in bounded time."""
    with nothing_left(), engine(model, "local", step_timeout_s=1.0) as one:
        freeze([one.health()[1].pid], frozen)
        values = np.zeros((2000, one.model.hidden_size), np.float32)
        big = TokensPrompt([1] * 2000, values, list(range(2000)))
        handles = [one.submit(big, dp_rank=1) for _ in range(8)]  # returns, long before it is read
        with pytest.raises(RankFailed, match=r"(^rank 1 has not|for ranks 1)"):
            handles[0].result(TOLD_S)
        closing = time.monotonic()
    assert time.monotonic() - closing < STOP_S


def test_a_close_does_not_wait_for_a_rank_that_is_stopped(model: Path, frozen: list[int]) -> None:
    """... and a second close() returns once the ranks are gone, not before."""
    with nothing_left():
        one = engine(model, "local")
        pids = [rank.pid for rank in one.health()]
        freeze(pids[1:], frozen)
        first = threading.Thread(target=one.close)
        closing = time.monotonic()
        first.start()
        wait_until(lambda: "closed" in str(one._core._closed), "the first close has begun")
        one.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert time.monotonic() - closing < STOP_S
        first.join()


@pytest.mark.parametrize(
    "collective", ["shared_memory", pytest.param("torch_distributed", marks=pytest.mark.slow)]
)
def test_ranks_that_are_paused_together_are_not_lost(
    collective: str, model: Path, frozen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.supervision.watch.MIN_SILENCE_S", 1.0)
    with engine(model, "local", step_timeout_s=1.0, collective=collective) as one:
        expected = one.generate([[1, 2, 3]], SHORT)[0].token_ids
        handle = one.submit([1, 2, 3], ENDLESS)
        next(iter(handle))
        freeze([rank.pid for rank in one.health()], frozen)
        time.sleep(2.3)
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)
        assert one.generate([[1, 2, 3]], SHORT)[0].token_ids == expected
        assert not handle.done
        handle.abort()
        handle.result(TOLD_S)


@pytest.mark.slow
def test_the_stopped_rank_is_named_over_gloo(model: Path, frozen: list[int]) -> None:
    gloo = "torch_distributed"
    with nothing_left(), engine(model, "local", collective=gloo, step_timeout_s=1.0) as one:
        handle = one.submit([1, 2, 3], ENDLESS, dp_rank=0)
        next(iter(handle))
        freeze([one.health()[1].pid], frozen)
        with pytest.raises(RankFailed, match=r"^rank 1 has not answered"):
            handle.result(TOLD_S)


@pytest.mark.slow
def test_a_rank_that_is_stopped_while_it_starts_is_named(model: Path, frozen: list[int]) -> None:
    known = rank_processes().keys()

    def stop_one() -> None:
        wait_until(lambda: len(rank_processes().keys() - known) == 2, "two ranks", 60)
        freeze([max(rank_processes().keys() - known)], frozen)

    with nothing_left():
        stopper = threading.Thread(target=stop_one)
        stopper.start()
        with pytest.raises(StartError, match=r"^rank [01] has not answered for .* \(during '"):
            engine(model, "local", start_timeout_s=12.0, step_timeout_s=4.0)
        stopper.join()


def test_a_forked_child_can_not_use_the_engine(model: Path) -> None:
    with engine(model, "local", dp_size=1) as one:
        handle = one.submit([1, 2, 3], ENDLESS)
        told: multiprocessing.SimpleQueue[list[str]] = multiprocessing.get_context(
            "fork"
        ).SimpleQueue()
        child = multiprocessing.get_context("fork").Process(
            target=lambda: told.put(_use_in_child(one, handle.result))
        )
        child.start()
        child.join(30)
        assert child.exitcode == 0
        texts = told.get()
        assert all(f"belongs to process {os.getpid()}" in text for text in texts), texts
        assert len(one.generate([[1, 2]], SHORT)[0].token_ids) == SHORT.max_tokens
        assert not handle.done


def _use_in_child(one: Engine, result: object) -> list[str]:
    texts = []
    uses = (result, one.health, one.report, lambda: one.submit([1]), lambda: one.generate([[1]]))
    for use in uses:
        try:
            use()  # type: ignore[operator]
        except EngineClosed as error:
            texts.append(str(error))
    one.close()  # ends nobody
    return texts


def test_an_engine_that_nobody_holds_leaves_no_rank(model: Path) -> None:
    with nothing_left():
        handle = engine(model, "local", dp_size=1).submit([1, 2], SHORT)
        assert len(handle.result(TOLD_S).token_ids) == SHORT.max_tokens  # it holds its engine
        del handle


UNCLOSED = """
import sys
from tests.workers.engines import ENDLESS, engine
one = engine(sys.argv[1], "local")
next(iter(one.submit([1, 2, 3], ENDLESS)))
"""


@pytest.mark.slow  # test_local has one with ranks that are threads
def test_a_program_ends_without_close(model: Path) -> None:
    with nothing_left():
        ended = subprocess.run(
            [sys.executable, "-c", UNCLOSED, str(model)],
            cwd=REPOSITORY, env=os.environ | {VARIABLE: session_token()},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.fixture
def interrupted_starts() -> Iterator[None]:
    """SIGINT interrupts the start of an engine, and nothing else."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        while frame is not None:
            if frame.f_code is engine.__code__:
                raise KeyboardInterrupt
            frame = frame.f_back

    before = signal.signal(signal.SIGINT, interrupt)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupted_starts")
def test_a_burst_of_interrupts_during_a_start_leaves_no_rank(model: Path) -> None:
    known = rank_processes().keys()

    def interrupt() -> None:
        wait_until(lambda: len(rank_processes().keys() - known) >= 2, "ranks", 90)
        for _ in range(6):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with nothing_left():
        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            engine(model, "local", dp_size=4)
        interrupter.join()


@pytest.mark.parametrize("name", ["start_timeout_s", "step_timeout_s"])
@pytest.mark.parametrize("seconds", [604_801, 2.2e6, 1e300, float("inf"), 0, -1, float("nan")])
def test_timeouts_that_no_wait_can_have_are_refused(name: str, seconds: float) -> None:
    fields: dict[str, Any] = {name: seconds}
    with pytest.raises(ValueError, match=rf"^{name}: .*604800"):
        EngineConfig("x", **fields)


@pytest.mark.parametrize("launcher", ["thread", "local"])
def test_the_longest_timeouts_work(launcher: str, model: Path) -> None:
    week: dict[str, Any] = {"start_timeout_s": 604_800.0, "step_timeout_s": 604_800.0}
    with engine(model, launcher, **week) as one:
        handles = [one.submit([1, 2], SHORT, dp_rank) for dp_rank in range(2)]
        for handle in handles:
            assert len(handle.result(float("inf")).token_ids) == SHORT.max_tokens


def test_a_rank_that_ends_while_all_close_is_not_waited_for(model: Path) -> None:
    """Rank 0 is in a step that would take until its timeout."""
    with nothing_left():
        one = engine(model, "local")
        pids = [rank.pid for rank in one.health()]
        for dp_rank in range(2):
            next(iter(one.submit([1, 2, 3], ENDLESS, dp_rank)))
        closing = time.monotonic()
        closer = threading.Thread(target=one.close)
        closer.start()
        os.kill(pids[1], signal.SIGTERM)
        closer.join()
        assert time.monotonic() - closing < STOP_S
