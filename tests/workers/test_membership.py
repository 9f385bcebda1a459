"""Ranks come and go while an engine serves: no request is lost, and no token changes."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from dp_runtime import Engine, SamplingParams
from dp_runtime.errors import EngineClosed, RankFailed, RankMissing, ResizeFailed, StartError
from dp_runtime.metrics.status import RankState
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.serving import check_pages_free
from tests.signals import stop
from tests.workers.disturbed import (
    NUM_REQUESTS,
    WAIT_S,
    Undisturbed,
    alike,
    delivered,
    kill,
    recovering,
    served,
)
from tests.workers.leftovers import rank_processes, wait_until
from tests.workers.test_watch import nothing_left
from workers.local_group import LocalLauncher
from workers.ranks import Seat
from workers.stages.rank_stages import Loaded
from workers.stages.resharding import Unsharded
from workers.supervision.epochs import Epochs
from workers.supervision.recovery import Recovery

ENDS_SOON = SamplingParams(max_tokens=2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("membership")))


@pytest.mark.parametrize(
    ("launcher", "num_drafts"),
    [
        ("thread", 0),
        pytest.param("thread", 2, marks=pytest.mark.slow),
        pytest.param("local", 0, marks=pytest.mark.slow),
        pytest.param("local", 2, marks=pytest.mark.slow),
        pytest.param("ray", 2, marks=pytest.mark.slow),
    ],
)
def test_a_resize_costs_no_request(
    model: Path, undisturbed: Undisturbed, launcher: str, num_drafts: int
) -> None:
    with (
        nothing_left(),
        recovering(model, launcher, dp_size=4, speculative_num_steps=num_drafts) as engine,
    ):
        expected = undisturbed(1, num_drafts)
        for epoch, size in enumerate((3, 2, 4), 1):
            assert alike(served(engine, 1, partial(engine.resize, size))) == expected
            assert engine.dp_ranks == tuple(range(size))
            assert [rank.dp_rank for rank in engine.health()] == [*range(size)]
            assert {rank.epoch for rank in engine.health()} == {epoch}
            check_pages_free(engine)
        assert engine.report().requests == 3 * NUM_REQUESTS


@pytest.mark.parametrize(
    "gone", [0, *(pytest.param(one, marks=pytest.mark.slow) for one in (1, 2))]
)
def test_any_rank_can_be_drained(model: Path, undisturbed: Undisturbed, gone: int) -> None:
    launcher = "local" if gone == 0 else "thread"
    with nothing_left(), recovering(model, launcher, dp_size=3) as engine:
        expected = undisturbed(1)
        assert alike(served(engine, 1, lambda: engine.drain(gone, 0.2))) == expected
        left = tuple(rank for rank in range(3) if rank != gone)
        assert engine.dp_ranks == left
        assert tuple(rank.dp_rank for rank in engine.metrics()) == left
        dump = engine.flight_record()
        assert tuple(rank.dp_rank for rank in dump.ranks) == left
        assert all(len(rank.steps[-1].passes[0].real_rows) == 2 for rank in dump.ranks)
        with pytest.raises(ValueError, match=rf"dp_rank: {gone} is not allowed; None or a rank in"):
            engine.submit([1], dp_rank=gone)
        assert engine.resize(3) == (0, 1, 2)
        assert alike(served(engine, 1, lambda: None)) == expected
        check_pages_free(engine)


def test_what_was_pinned_to_a_rank_that_leaves_goes_on_elsewhere(model: Path) -> None:
    endless = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)
    with recovering(model, "thread", dp_size=2) as engine:
        expected = engine.generate([[5, 6, 7]], endless)[0].token_ids
        handles = [engine.submit([5, 6, 7], endless, dp_rank=1) for _ in range(4)]
        next(iter(handles[0]))
        doomed = engine.submit([5, 6], endless, dp_rank=1)
        doomed.abort()
        assert engine.drain(1) == (0,)
        assert {output.token_ids for output in delivered(handles)} == {expected}
        assert {handle.result(WAIT_S).dp_rank for handle in handles} == {0}
        assert doomed.result(WAIT_S).finish_reason == "abort"
        check_pages_free(engine)


def test_requests_of_a_rank_end_there_if_they_have_the_time(model: Path) -> None:
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    with recovering(model, "thread", dp_size=2) as engine:
        handles = [engine.submit([5, 6, 7], params, dp_rank=1) for _ in range(4)]
        engine.drain(1, WAIT_S)
        assert [handle.result(WAIT_S).dp_rank for handle in handles] == [1] * 4


def test_experts_are_split_unevenly_over_more_ranks_than_at_the_start(
    model: Path, undisturbed: Undisturbed
) -> None:
    with nothing_left(), recovering(model, "local", dp_size=1) as engine:
        expected = undisturbed(1)
        assert alike(served(engine, 1, partial(engine.resize, 3))) == expected
        assert len(rank_processes()) == 3
        assert alike(served(engine, 1, partial(engine.drain, 0))) == expected
        assert engine.dp_ranks == (1, 2)
        wait_until(lambda: len(rank_processes()) == 2, "the process has ended")


@pytest.mark.slow
def test_ray_gives_new_ranks_room_of_their_own(model: Path, undisturbed: Undisturbed) -> None:
    with nothing_left(), recovering(model, "ray", dp_size=1) as engine:
        expected = undisturbed(1)
        for size in (2, 1, 2):
            assert alike(served(engine, 1, partial(engine.resize, size))) == expected


def killed_while_it_changes(engine: Engine, size: int, delay_s: float) -> None:
    """Kill a rank while the ranks change, whichever is there then."""
    known = {rank.pid for rank in engine.health()}

    def kill_one() -> None:
        pids = sorted({*rank_processes()} - known) if delay_s < 0 else sorted(known)
        os.kill(pids[-1] if pids else min(known), signal.SIGKILL)

    killer = threading.Timer(abs(delay_s), kill_one)
    killer.start()
    try:
        engine.resize(size)
    finally:
        killer.join()


@pytest.mark.parametrize(
    "delay_s", [0.1, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.0, 0.4, 0.8, 1.2))]
)
def test_a_rank_that_is_killed_during_a_change_costs_no_request(
    model: Path, undisturbed: Undisturbed, delay_s: float
) -> None:
    with nothing_left(), recovering(model, "local", dp_size=2) as engine:
        expected = undisturbed(1)
        for size in (3, 2):
            try:
                disturb = partial(killed_while_it_changes, engine, size, delay_s)
                assert alike(served(engine, 1, disturb)) == expected
            except ResizeFailed:  # they go on as they were
                pass
            assert alike(served(engine, 1, lambda: None)) == expected
            check_pages_free(engine)


@pytest.fixture
def soon_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that loads may be silent for no longer than one that serves."""
    monkeypatch.setattr("workers.supervision.watch.LOADING", 1)


@pytest.mark.usefixtures("soon_silent")
def test_a_rank_that_is_stopped_as_all_meet_holds_nobody_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, stopped = Epochs.begin, list[int]()

    def begin_without_one(self: Epochs, *given: Any, **named: Any) -> None:
        if self.number == 0:
            host = self._ranks.seat(1).host
            assert host is not None
            assert host.flight is not None
            stopped.append(host.flight.pid)
            stop(host.flight.pid)
        begin(self, *given, **named)

    monkeypatch.setattr("workers.supervision.recovery.MEET_S", 100 * WAIT_S)
    monkeypatch.setattr(Epochs, "begin", begin_without_one)
    with nothing_left(), recovering(model, "local", dp_size=1) as engine:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(engine.resize, 2).result(WAIT_S) == (0, 1)
        assert [rank.epoch for rank in engine.health()] == [2, 2]
        assert engine.health()[1].pid != stopped[0]


def stopped_as_it_loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Stop the next rank that is to load, once; return its pid."""
    load, stopped = Epochs.load, list[int]()

    def load_but_one(self: Epochs, seats: Sequence[Seat], *given: Any, **named: Any) -> Any:
        if not stopped:
            host = seats[0].host
            assert host is not None
            assert host.flight is not None
            stopped.append(host.flight.pid)
            stop(stopped[0])
        return load(self, seats, *given, **named)

    monkeypatch.setattr(Epochs, "load", load_but_one)
    return stopped


@pytest.mark.usefixtures("soon_silent")
def test_a_new_rank_that_is_stopped_as_it_loads_holds_no_change_up(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_left(), recovering(model, "local", dp_size=1) as engine:
        stopped = stopped_as_it_loads(monkeypatch)
        with pytest.raises(
            ResizeFailed, match=r"^rank 1 has not answered for .* \(during 'load'\)"
        ):
            engine.resize(2)
        assert engine.dp_ranks == (0,)
        assert engine.resize(2) == (0, 1)
        assert engine.health()[1].pid != stopped[0]


@pytest.mark.usefixtures("soon_silent")
def test_a_successor_that_is_stopped_as_it_loads_is_replaced(
    model: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_left(), recovering(model, "local", dp_size=2) as engine:
        stopped = stopped_as_it_loads(monkeypatch)
        expected = undisturbed(1)
        pid = engine.health()[1].pid
        assert alike(served(engine, 1, partial(kill, [pid]))) == expected
        assert engine.health()[1].pid not in (pid, *stopped)
        assert len(stopped) == 1


@pytest.mark.parametrize("victim", [0, 1])
def test_a_change_that_is_asked_for_as_a_rank_is_lost_waits_for_its_successor(
    model: Path, undisturbed: Undisturbed, victim: int
) -> None:
    with nothing_left(), recovering(model, "local", dp_size=2) as engine:
        expected = undisturbed(1)

        def kill_and_resize() -> None:
            kill([engine.health()[victim].pid])
            assert engine.resize(3) == (0, 1, 2)

        assert alike(served(engine, 1, kill_and_resize)) == expected
        assert engine.drain(victim) == tuple(rank for rank in range(3) if rank != victim)
        check_pages_free(engine)


@pytest.fixture
def killed_as_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill rank 0 as the ranks begin to change."""
    change = Recovery.change

    def change_without_one(self: Recovery, *given: Any) -> None:
        handle = self._ranks.seat(0).handle
        handle.kill()
        change(self, *given)

    monkeypatch.setattr(Recovery, "change", change_without_one)


@pytest.mark.usefixtures("killed_as_it_changes")
def test_a_loss_during_a_change_counts_as_one_of_the_recoveries(model: Path) -> None:
    with nothing_left(), recovering(model, "local", dp_size=1, max_recoveries=1) as engine:
        assert engine.resize(2) == (0, 1)
        kill([engine.health()[1].pid])
        wait_until(lambda: engine._core.has_failed, "the end", WAIT_S)
        with pytest.raises(
            RankFailed, match=r"recovered within 60 s before: ranks \[0\] \(the ranks"
        ):
            engine.submit([1])


@pytest.mark.usefixtures("killed_as_it_changes")
def test_a_loss_during_a_change_is_not_recovered_where_none_may_be(model: Path) -> None:
    with nothing_left(), recovering(model, "local", dp_size=1, max_recoveries=0) as engine:
        with pytest.raises(
            RankFailed, match=r"^ranks \[0\] were lost as the ranks are to be 0\.\.1$"
        ):
            engine.resize(2)
        assert engine._core.has_failed


@pytest.mark.slow
def test_a_rank_that_is_lost_as_others_load_costs_nobody_else(
    model: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Unsharded.load

    def slow_or_lost(self: Unsharded, *given: Any) -> Loaded:
        monkeypatch.setattr("workers.supervision.recovery.SUSPEND_S", 0.5)
        if self.prepared.dp_rank == 1:
            raise RuntimeError("the fault of a test")
        given[1].state = RankState.LOADING
        sleep(3.0)
        return load(self, *given)

    monkeypatch.setattr(Unsharded, "load", slow_or_lost)
    with recovering(model, "thread", dp_size=2) as engine:
        ranks = engine._core._group._ranks  # type: ignore[attr-defined]
        survivor, lost = (ranks.seat(dp_rank).handle for dp_rank in (0, 1))
        expected = undisturbed(1)
        assert alike(served(engine, 1, partial(engine.resize, 3))) == expected
        assert engine.dp_ranks == (0, 1, 2)
        assert ranks.seat(0).handle is survivor, "it was given the time to load"
        assert ranks.seat(1).handle is not lost


def test_a_new_rank_that_can_not_start_changes_nothing(
    model: Path, undisturbed: Undisturbed, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise StartError("no room for ranks [2]")

    with recovering(model, "thread", dp_size=2) as engine:
        expected = undisturbed(1)
        monkeypatch.setattr("workers.local_group.LocalLauncher.make_room", full)

        def refused() -> None:
            with pytest.raises(ResizeFailed, match=r"^no room for ranks \[2\]; ranks 0..1 serve"):
                engine.resize(3)

        assert alike(served(engine, 1, refused)) == expected
        assert {rank.epoch for rank in engine.health()} == {0}


@pytest.mark.parametrize(
    "launcher", ["thread", pytest.param("local", marks=pytest.mark.slow)]
)  # fmt: skip
def test_new_ranks_that_can_not_meet_the_others_change_nothing(
    model: Path, undisturbed: Undisturbed, launcher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = Epochs.begin

    def begin_for_two(self: Epochs, *given: Any, **named: Any) -> None:
        begin(self, *given, **named)
        if self._ranks.members.size > 2:
            raise StartError("no room where ranks meet")

    monkeypatch.setattr(Epochs, "begin", begin_for_two)
    with nothing_left(), recovering(model, launcher, dp_size=2) as engine:
        expected = undisturbed(1)

        def refused() -> None:
            with pytest.raises(ResizeFailed, match=r"^no room where ranks meet; ranks 0..1 serve"):
                engine.resize(4)

        assert alike(served(engine, 1, refused)) == expected
        assert engine.dp_ranks == (0, 1)
        assert [rank.dp_size for rank in engine.health()] == [2, 2]
        check_pages_free(engine)
        monkeypatch.setattr(Epochs, "begin", begin)
        assert engine.resize(4) == (0, 1, 2, 3)
        assert alike(served(engine, 1, lambda: None)) == expected


def test_a_close_ends_a_change(model: Path) -> None:
    with nothing_left(), recovering(model, "local", dp_size=1) as engine:
        ended: list[BaseException] = []

        def change() -> None:
            try:
                engine.resize(3)
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=change)
        thread.start()
        wait_until(lambda: len(rank_processes()) > 1, "new ranks start", WAIT_S)
        engine.close()
        thread.join(WAIT_S)
    assert [type(error) for error in ended] == [EngineClosed]


def test_wrong_changes_are_refused(model: Path) -> None:
    with recovering(model, "thread", dp_size=2) as engine:
        for size in (0, -1, 5000, True, "2", None, 1.5):
            with pytest.raises(ValueError, match=r"^dp_size: "):
                engine.resize(size)  # type: ignore[arg-type]
        for rank in (2, -1, None, "0", True):
            with pytest.raises(ValueError, match=r"^dp_rank: .* a rank in 0\.\.1$"):
                engine.drain(rank)  # type: ignore[arg-type]
        for seconds in (-1, float("nan"), float("inf"), None):
            with pytest.raises(ValueError, match=r"^timeout_s: "):
                engine.drain(0, seconds)  # type: ignore[arg-type]
        assert engine.drain(0) == (1,)
        with pytest.raises(ValueError, match="the last rank can't go"):
            engine.drain(1)
    with pytest.raises(EngineClosed):
        engine.resize(2)


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, no rank can be launched."""
    refuses, launch = threading.Event(), LocalLauncher.launch

    def refusing(self: LocalLauncher, dp_rank: int) -> Any:
        if refuses.is_set():
            raise StartError(f"no room for rank {dp_rank}")
        return launch(self, dp_rank)

    monkeypatch.setattr(LocalLauncher, "launch", refusing)
    monkeypatch.setattr("workers.supervision.changes.RESTORE_S", 0.2)
    return refuses


@pytest.mark.parametrize(
    ("num_drafts", "victims"), [(0, [1]), pytest.param(2, [0, 2], marks=pytest.mark.slow)]
)
def test_others_go_on_without_a_rank_that_can_not_be_replaced(
    model: Path,
    undisturbed: Undisturbed,
    full: threading.Event,
    num_drafts: int,
    victims: list[int],
) -> None:
    fields = {"min_dp_size": 1, "speculative_num_steps": num_drafts}
    with nothing_left(), recovering(model, "local", **fields) as engine:
        expected = undisturbed(1, num_drafts)
        full.set()
        pids = [engine.health()[rank].pid for rank in victims]
        assert alike(served(engine, 1, partial(kill, pids))) == expected
        left = tuple(rank for rank in range(3) if rank not in victims)
        assert engine.dp_ranks == left
        assert [rank.dp_size for rank in engine.health()] == [len(left)] * len(left)
        with pytest.raises(RankMissing, match=rf"^dp_rank: rank {victims[0]} was lost; "):
            engine.submit([1], dp_rank=victims[0])
        with pytest.raises(ValueError, match=r"^dp_rank: 3 is not allowed; "):
            engine.submit([1], dp_rank=3)
        assert alike(served(engine, 1, full.clear)) == expected
        wait_until(lambda: engine.dp_ranks == (0, 1, 2), "all ranks are back", WAIT_S)
        assert alike(served(engine, 1, lambda: None)) == expected
        assert engine.generate([[1]], ENDS_SOON, [victims[0]])[0].dp_rank == victims[0]
        check_pages_free(engine)


def test_fewer_ranks_than_min_dp_size_end_the_engine(model: Path, full: threading.Event) -> None:
    with nothing_left(), recovering(model, "local", dp_size=2, max_recoveries=3) as engine:
        full.set()
        os.kill(engine.health()[1].pid, signal.SIGKILL)
        wait_until(lambda: engine._core._closed is not None, "the end", WAIT_S)
        with pytest.raises(RankFailed, match="3 attempts to replace ranks failed"):
            engine.generate([[1]])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_random_walk_of_changes_and_faults_costs_no_request(
    model: Path, undisturbed: Undisturbed, seed: int
) -> None:
    draw = random.Random(seed)
    fields = {"speculative_num_steps": 2 * (seed % 2), "max_recoveries": 50}
    with nothing_left(), recovering(model, "local", **fields) as engine:
        expected = undisturbed(seed, 2 * (seed % 2))

        def disturb() -> None:
            match draw.choice(["resize", "drain", "kill", "both"]):
                case "resize":
                    engine.resize(draw.randint(1, 4))
                case "drain" if len(engine.dp_ranks) > 1:
                    engine.drain(draw.choice(engine.dp_ranks), draw.choice([0.0, 0.2]))
                case "kill":
                    kill([draw.choice([rank.pid for rank in engine.health() if rank.pid])])
                case "both":
                    kill([draw.choice([rank.pid for rank in engine.health() if rank.pid])])
                    with suppress(ResizeFailed):  # a rank that is lost can not be asked
                        engine.resize(draw.randint(1, 4))

        for _ in range(8):
            assert alike(served(engine, seed, disturb)) == expected
            check_pages_free(engine)
        assert len(rank_processes()) == len(engine.dp_ranks)
