"""A standby takes the place of a lost rank: no token changes, and none is left behind."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from dp_runtime import Engine, EngineConfig
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.serving import check_pages_free
from tests.workers.disturbed import WAIT_S, alike, kill, recovering, served
from tests.workers.engines import Driver
from tests.workers.leftovers import rank_processes, wait_until
from tests.workers.test_watch import nothing_left
from workers.ranks import RankHandle, Seat
from workers.standby.reserve import StandbyReserve


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("standby")))


def warm(engine: Engine, count: int = 1) -> None:
    wait_until(lambda: engine.num_standbys == count, f"{count} warm standbys", WAIT_S)


def standby_pids() -> list[int]:
    return [pid for pid in rank_processes() if psutil.Process(pid).name() == "dp-rank-standby"]


def open_copies() -> list[str]:
    links = [os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink()]
    return [link for link in links if "dp-runtime-weights-" in link]


def test_a_standby_takes_the_place_of_a_killed_rank(own_model: Path) -> None:
    fields: dict[str, Any] = {"standby_ranks": 1, "host_weights": True}
    others = open_copies()
    with nothing_left(), recovering(own_model, "local", **fields) as engine:
        expected = alike(served(engine, 1, lambda: None))
        warm(engine)
        idle = standby_pids()
        kill(idle)  # which disturbs nobody
        wait_until(lambda: bool({*standby_pids()} - {*idle}), "another", WAIT_S)
        warm(engine)
        assert {rank.epoch for rank in engine.health()} == {0}
        idle, victim = standby_pids(), engine.health()[1].pid
        (own_model / "model.safetensors").write_bytes(b"")  # which nobody has to read again
        assert alike(served(engine, 1, partial(kill, [victim]))) == expected
        after = engine.health()
        assert [after[1].pid] == idle
        assert {rank.epoch for rank in after} == {1}
        assert psutil.Process(after[1].pid).name() == "dp-rank-1"
        assert len(set(open_copies()) - set(others)) == 3
        check_pages_free(engine)
    assert open_copies() == others


@pytest.mark.slow
@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("num_victims", [1, 2])
def test_losses_with_one_standby(
    model: Path, num_drafts: int, number: signal.Signals, num_victims: int
) -> None:
    fields: dict[str, Any] = {"speculative_num_steps": num_drafts, "standby_ranks": 1}
    with nothing_left(), recovering(model, "local", **fields) as engine:
        expected = alike(served(engine, 2, lambda: None))
        warm(engine)
        before, idle = [rank.pid for rank in engine.health()], standby_pids()

        def disturb() -> None:
            for pid in before[:num_victims]:
                os.kill(pid, number)

        assert alike(served(engine, 2, disturb)) == expected
        assert set(idle) <= {rank.pid for rank in engine.health()[:num_victims]}
        assert engine.health()[2].pid == before[2]
        warm(engine)
        check_pages_free(engine)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_standby_that_is_lost_as_it_takes_over(
    model: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    take = StandbyReserve.take
    hit: list[int] = []

    def fatal(self: StandbyReserve, seat: Seat) -> RankHandle | None:
        found = standby_pids()
        handle = take(self, seat)
        if not hit:
            hit.extend(found)
            os.kill(found[0], number)
        return handle

    monkeypatch.setattr(StandbyReserve, "take", fatal)
    with nothing_left(), recovering(model, "local", standby_ranks=1) as engine:
        expected = alike(served(engine, 3, lambda: None))
        warm(engine)
        victim = engine.health()[0].pid
        assert alike(served(engine, 3, partial(kill, [victim]))) == expected
        assert len(hit) == 1
        assert engine.health()[0].pid not in (victim, *hit)


@pytest.mark.slow
@pytest.mark.ray
def test_an_actor_stands_by(model: Path) -> None:
    with nothing_left(), recovering(model, "ray", standby_ranks=1) as engine:
        expected = alike(served(engine, 4, lambda: None))
        warm(engine)
        ranks = {rank.pid for rank in engine.health()}
        (idle,) = set(rank_processes()) - ranks
        victim = engine.health()[2].pid
        assert alike(served(engine, 4, partial(kill, [victim]))) == expected
        assert engine.health()[2].pid == idle
        warm(engine)


@pytest.mark.slow
def test_no_standby_outlives_its_driver(model: Path, tmp_path: Path) -> None:
    flags = ("--launcher", "local", "--standby-ranks", "2")
    with nothing_left(), Driver(model, tmp_path, 2, *flags) as driver:
        wait_until(lambda: len(standby_pids()) == 2, "standbys", WAIT_S)
        driver.signal(signal.SIGKILL)
        driver.end()
        wait_until(lambda: not standby_pids(), "their end")


def test_threads_need_no_standby() -> None:
    with pytest.raises(ValueError, match=r"^standby_ranks: 1 is not allowed; 0 with launcher thr"):
        EngineConfig("x", launcher="thread", standby_ranks=1)
