"""Ranks as processes and as threads: use, failures, interrupts, and what is left afterwards."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from dp_runtime import Engine, EngineConfig
from dp_runtime.core.request import FinishReason
from dp_runtime.errors import EngineClosed, EngineOverloaded, RankFailed, StartError
from dp_runtime.metrics.status import RankState
from dp_runtime.startup.build_rank import load_rank
from dp_runtime.startup.loaded_rank import LoadedRank
from tests.checkpoints import tiny_checkpoint
from tests.signals import stop
from tests.workers.engines import ENDLESS, SHORT, TOLD_S, Driver, engine
from tests.workers.leftovers import (
    left_overs,
    nothing_new,
    rank_processes,
    serving_processes,
    wait_until,
)
from workers import local_group
from workers.messages import Call, Join, Load, Prepare, Rendezvous
from workers.stages import rank_stages
from workers.supervision.leaving import STOP_S


@pytest.fixture(scope="module", params=["thread", "local"])
def serving(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    with engine(model, request.param) as one:
        yield one


def test_a_result_can_be_waited_for_with_a_limit(serving: Engine) -> None:
    handle = serving.submit([1, 2], ENDLESS)
    with pytest.raises(TimeoutError, match=rf"request {handle.request_id} .* 0.2 s"):
        handle.result(0.2)
    handle.abort()
    output = handle.result(30)
    assert output.finish_reason is FinishReason.ABORT
    assert 0 < len(output.token_ids) < ENDLESS.known_max_tokens
    handle.abort()  # after its end, this changes nothing
    assert handle.result().finish_reason is FinishReason.ABORT
    no_page_in_use(serving)


def test_a_stream_that_is_left_early_aborts_its_request(serving: Engine) -> None:
    for count, delta in enumerate(serving.stream([3, 4], ENDLESS), 1):
        assert len(delta.token_ids) >= 1
        if count == 3:
            break
    no_page_in_use(serving)


def test_a_stream_is_the_generated_output(serving: Engine) -> None:
    deltas = list(serving.stream([5, 6, 7], SHORT, dp_rank=1))
    output = serving.generate([[5, 6, 7]], SHORT, [0])[0]
    assert tuple(token for delta in deltas for token in delta.token_ids) == output.token_ids
    assert [delta.finish_reason for delta in deltas][-1] is FinishReason.LENGTH
    assert output.dp_rank == 0


def test_another_engine_beside_it(serving: Engine, model: Path) -> None:
    endless = serving.submit([1, 2, 3], ENDLESS)
    with engine(model, "thread") as other:
        assert other.generate([[8, 9]], SHORT)[0].token_ids == (
            serving.generate([[8, 9]], SHORT)[0].token_ids
        )
    assert not endless.done
    endless.abort()
    endless.result(30)


def test_health_of_all_ranks(serving: Engine) -> None:
    handle = serving.submit([1, 2], ENDLESS, dp_rank=1)
    next(iter(handle))
    first, second = serving.health()
    assert [first.state, second.state] == [RankState.RUNNING] * 2
    assert (first.num_running, second.num_running) == (0, 1)
    assert second.free_pages < second.num_pages - 1
    assert second.last_step >= 0
    assert second.last_step_age_s < 30
    assert (first.pid == os.getpid()) == (serving.config.launcher == "thread")
    handle.abort()
    no_page_in_use(serving)
    wait_until(lambda: {r.state for r in serving.health()} == {RankState.IDLE}, "idle")


def no_page_in_use(serving: Engine) -> None:
    wait_until(
        lambda: all(rank.free_pages == rank.num_pages - 1 for rank in serving.health()),
        "all pages are free",
    )


def test_an_overloaded_engine(model: Path) -> None:
    with engine(model, "thread", max_queued_requests=2) as one:
        handles = [one.submit([1], ENDLESS) for _ in range(2)]
        with pytest.raises(EngineOverloaded, match="2 requests are unfinished, and 2 may be"):
            one.submit([1], SHORT)
        handles[0].abort()
        handles[0].result(30)
        assert one.submit([1], SHORT).result(10).finish_reason is FinishReason.LENGTH
        handles[1].abort()
        assert len(one.generate([[1]] * 9, SHORT)) == 9  # generate waits for places


@pytest.mark.parametrize("launcher", ["thread", "local"])
def test_use_after_close(launcher: str, model: Path) -> None:
    before = left_overs()
    one = engine(model, launcher, dp_size=1)
    handle = one.submit([1, 2], ENDLESS)
    one.close()
    one.close()
    for use in (
        handle.result,
        lambda: one.generate([[1]], SHORT),
        lambda: one.submit([1]),
        lambda: next(one.stream([1])),
        one.report,
        one.step_trace,
        one.health,
    ):
        with pytest.raises(EngineClosed, match="the engine is closed"):
            use()
    handle.abort()
    wait_until(lambda: nothing_new(before), "nothing is left")


def test_ranks_that_are_threads_leave_no_memory_to_the_collector(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pools: list[weakref.ref[Tensor]] = []

    def load(*what: Any) -> LoadedRank:
        rank = load_rank(*what)
        pools.extend(map(weakref.ref, rank.pools))
        return rank

    monkeypatch.setattr(rank_stages, "load_rank", load)
    gc.disable()
    try:
        with engine(model, "thread") as served:
            assert len(served.generate([[1, 2]], SHORT)[0].token_ids) == SHORT.max_tokens
            assert all(pool() is not None for pool in pools)
        wait_until(lambda: not any(pool() is not None for pool in pools), "no page is left")
    finally:
        gc.enable()
    assert pools


def test_a_killed_rank_fails_all_requests(model: Path) -> None:
    before = left_overs()
    with engine(model, "local", dp_size=3) as one:
        handles = [one.submit([1, 2, 3], ENDLESS, rank) for rank in range(3)]
        for handle in handles:
            next(iter(handle))
        killed = time.monotonic()
        os.kill(one.health()[1].pid, signal.SIGKILL)
        for handle in handles:
            with pytest.raises(RankFailed, match=r"rank 1 ended \(SIGKILL\)"):
                handle.result(TOLD_S)
        assert time.monotonic() - killed < TOLD_S
        with pytest.raises(RankFailed, match="rank 1 ended"):
            one.submit([1])
        wait_until(
            lambda: (
                [rank.state for rank in one.health()]
                == [RankState.FAILED, RankState.UNREACHABLE, RankState.FAILED]
            ),
            "survivors have stopped their step",
        )
        assert "rank 1 ended (SIGKILL)" in one.health()[0].error
        closing = time.monotonic()
    assert time.monotonic() - closing < STOP_S
    wait_until(lambda: nothing_new(before), "nothing is left")


@pytest.mark.slow
def test_a_stopped_rank_is_a_timeout(model: Path) -> None:
    before = left_overs()
    with engine(model, "local", step_timeout_s=1.0) as one:
        handle = one.submit([1, 2, 3], ENDLESS, dp_rank=0)
        next(iter(handle))
        stopped = one.health()[1].pid
        stop(stopped)
        with pytest.raises(RankFailed, match=r"rank 0: CollectiveTimeout: .* for ranks 1"):
            handle.result(TOLD_S)
        closing = time.monotonic()
    assert time.monotonic() - closing < STOP_S
    wait_until(lambda: nothing_new(before), "nothing is left, not even the stopped one")


def test_a_start_that_fails_on_one_rank(tmp_path: Path) -> None:
    before = left_overs()
    path = tiny_checkpoint(tmp_path) / "model.safetensors"
    tensors, name = load_file(path), "model.layers.1.mlp.experts.7.up_proj.weight"  # rank 1's
    tensors[name] = tensors[name][:-1].clone()
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"^rank 1: .*{name}: shape: \(47, 64\)"):
        engine(tmp_path, "local")
    wait_until(lambda: nothing_new(before), "nothing is left")


def test_a_rank_that_dies_while_it_starts(model: Path) -> None:
    before = left_overs()

    def kill_one() -> None:
        wait_until(lambda: len(rank_processes()) > len(before[0]), "a rank has started", 200)
        os.kill(min(rank_processes().keys() - before[0]), signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(StartError, match=r"^the process of rank 0 ended \(SIGKILL\)$"):
        engine(model, "local")
    killer.join()
    wait_until(lambda: nothing_new(before), "nothing is left")


PROGRAM = """
import sys
from dp_runtime.cli.main import main
from tests.workers.engines import ENDLESS, engine
print(main(sys.argv[2:]), flush=True)
one = engine(sys.argv[1], "thread")
next(iter(one.submit([1, 2, 3], ENDLESS)))
"""


def test_an_interrupt_and_the_end_of_the_program_leave_nothing(model: Path, tmp_path: Path) -> None:
    """Ctrl-C ends a command; then the program ends, and nobody closes an engine of threads."""
    before = left_overs()
    command = (sys.executable, "-c", PROGRAM, str(model))
    with Driver(model, tmp_path, 2, "--launcher", "local", command=command) as driver:
        wait_until(lambda: len(serving_processes() - before[0]) == 2, "two ranks serve", 200)
        driver.signal(signal.SIGINT)
        status, shown, errors = driver.end()
    assert shown.splitlines()[-1] == "130"
    assert (status, errors) == (0, "")
    wait_until(lambda: nothing_new(before), "nothing is left")


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_ranks_end_with_their_driver(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """A stopped job is sent SIGTERM, then SIGKILL: the driver has no time to clean up.

    Its ranks have its level of logging and name themselves.
    """
    before, flags = left_overs(), ("--launcher", "local", "--log-level", "info")
    with Driver(model, tmp_path, 2, *flags) as driver:
        wait_until(lambda: len(serving_processes() - before[0]) == 2, "two ranks serve", 200)
        ranks = serving_processes() - before[0]
        driver.signal(number)
        status, shown, errors = driver.end()
    assert status == -number
    assert "rank 0 INFO dp_runtime.startup.build_rank: attention backend torch_ref" in errors
    assert "\nrank 1 INFO dp_runtime." in "\n" + errors
    assert "INFO" not in shown
    wait_until(lambda: not ranks & rank_processes().keys(), "the ranks end")
    wait_until(lambda: left_overs()[2] <= before[2], "no name is left")


def test_a_rank_that_waits_for_others_ends_with_its_driver(model: Path, tmp_path: Path) -> None:
    """It removes the names of a meeting that never takes place."""
    process, connection = local_group._fork(0, 60.0)
    meeting = tmp_path / "meeting"
    with connection as driver:  # closing it ends the rank, also if the test fails
        driver.send((0, EngineConfig(str(model), dp_size=2, num_pages=1100), "cpu"))
        for call_id, message in enumerate((Prepare(), Load())):
            driver.send(Call.with_message(call_id, message))
            assert driver.recv().answer[1] is None
        join = Join(Rendezvous("shared_memory", str(meeting)), epoch=0)
        driver.send(Call.with_message(2, join))
        wait_until(lambda: (meeting / "region").exists(), "the rank waits")
    assert process.wait(20) == 0
    assert not meeting.exists()
