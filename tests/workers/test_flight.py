"""Flight records of real ranks: on demand, and of those that are stopped, killed or disagree."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from dp_runtime import Engine
from dp_runtime.cli.main import main
from dp_runtime.errors import EngineClosed, RankFailed
from dp_runtime.flight.diagnosis import diagnose
from dp_runtime.flight.dump_file import read_dump
from dp_runtime.flight.record import FlightDump, ProcessState, Source
from dp_runtime.flight.stragglers import common_busy_steps
from tests.serving import loops_of
from tests.signals import stop
from tests.workers.engines import ENDLESS, TOLD_S, engine
from tests.workers.leftovers import wait_until


def load(one: Engine) -> None:
    """Keep all ranks busy, for more steps than it takes to know a slow one."""
    handles = [one.submit([1, 2, 3], ENDLESS, rank) for rank in range(one.config.dp_size)]
    for handle in handles:
        for count, _ in enumerate(handle):
            if count == 20:
                break


def written(room: Path) -> Path:
    """The one record that an engine has written; it is complete once the engine is closed."""
    (path,) = room.iterdir()
    return path


def shown_odd(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["doctor", str(path)]) == 1
    out: str = capsys.readouterr().out
    return next(line for line in out.splitlines() if line.startswith("  rank "))


def check_healthy(dump: FlightDump) -> None:
    assert [rank.dp_rank for rank in dump.ranks] == list(range(len(dump.ranks)))
    assert all(not rank.error for rank in dump.ranks)
    for finding in diagnose(dump):  # on a busy machine a rank may well be slow
        assert "it is slow" in finding.text or "it is behind" in finding.text
    steps = common_busy_steps(dump.ranks)
    assert len(steps) > 20
    for of_ranks in steps.values():
        first = of_ranks[0]
        assert all(one.passes[0].real_rows == first.passes[0].real_rows for one in of_ranks)
        for rank, one in enumerate(of_ranks):
            assert one.rows == (first.passes[0].real_rows[rank],)
            assert 0 < one.begun_us <= one.posted_us <= one.agreed_us <= one.passes[0].begun_us
            assert [c.kind for c in one.collectives] == ["all_gather", "reduce_scatter"] * 2
            assert all(0 < c.entered_us <= c.left_us for c in one.collectives)


def test_an_engine_that_is_closed_keeps_no_ring(model: Path) -> None:
    def num_rings() -> int:
        return Path("/proc/self/maps").read_text().count("dp-flight")

    before = num_rings()
    one = engine(model, "local")
    assert num_rings() == before + 2
    one.close()
    assert num_rings() == before, "the engine is still held"


@pytest.mark.parametrize(
    "collective",
    ["shared_memory", pytest.param("torch_distributed", marks=pytest.mark.slow)],
)
def test_a_stopped_rank_is_named_with_where_it_stopped(
    collective: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    fields = {"step_timeout_s": 1.0, "flight_dump_dir": str(tmp_path / "records")}
    with engine(model, "local", dp_size=4, collective=collective, **fields) as one:
        load(one)
        well = one.flight_record()
        check_healthy(well)
        pids = [rank.pid for rank in one.health()]
        assert [rank.pid for rank in well.ranks] == pids
        assert {rank.source for rank in well.ranks} == {Source.MEMORY}
        assert {rank.process for rank in well.ranks} == {ProcessState.RUNNING}
        assert {rank.transport for rank in well.ranks} == {collective}
        handle = one.submit([1, 2, 3], ENDLESS, dp_rank=0)
        stop(pids[2])
        with pytest.raises(RankFailed):
            handle.result(TOLD_S)
        stopped = one.flight_record().ranks[2]
    path = written(tmp_path / "records")
    assert f"flight record written to {path}; `dp-runtime doctor` reads it" in caplog.messages
    text = shown_odd(path, capsys)
    assert text.startswith("  rank 2: its process is stopped (SIGSTOP, or a debugger); in step ")
    assert f"in step {stopped.phase_step}" in text
    assert "last answer to the driver" in text
    assert "it did not" in text
    dump = read_dump(path)
    assert [finding.dp_ranks for finding in diagnose(dump)] == [(2,)]
    assert "rank 2 has not answered" in dump.reason
    assert [rank.source for rank in dump.ranks] == [Source.MEMORY] * 4
    with pytest.raises(EngineClosed):
        one.flight_record()


def test_a_killed_rank_is_named(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    room = tmp_path / "records"
    with engine(model, "local", dp_size=2, flight_dump_dir=str(room)) as one:
        load(one)
        handle = one.submit([1, 2, 3], ENDLESS, dp_rank=0)
        os.kill(one.health()[1].pid, signal.SIGKILL)
        with pytest.raises(RankFailed):
            handle.result(TOLD_S)
    assert shown_odd(written(room), capsys).startswith("  rank 1: its process has ended; in step ")
    assert read_dump(written(room)).reason == "the process of rank 1 ended (SIGKILL)"


@pytest.fixture
def threads(model: Path, tmp_path: Path) -> Engine:
    return engine(model, "thread", dp_size=4, flight_dump_dir=str(tmp_path), step_timeout_s=20.0)


def test_a_rank_that_posts_another_record_is_named(
    threads: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with threads as one:
        load(one)
        well = one.flight_record()
        check_healthy(well)
        assert {rank.source for rank in well.ranks} == {Source.ANSWER}
        handle = one.submit([1, 2, 3], ENDLESS, dp_rank=0)
        loops_of(one)[3].coordinator.step_id += 1
        with pytest.raises(RankFailed, match="ranks disagree about the step"):
            handle.result(TOLD_S)
    text = shown_odd(written(tmp_path), capsys)
    assert text.startswith("  rank 3: its record (epoch, step, program, number of passes) is ")
    assert "that of ranks 0, 1, 2 is " in text


def test_a_rank_that_fails_by_itself_is_named_without_what_it_said(
    threads: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("a secret prompt")

    with threads as one:
        load(one)
        loops_of(one)[1].scheduler.commit = fail  # type: ignore[assignment]
        wait_until(lambda: bool(one.flight_record().ranks[1].error), "rank 1 has failed")
    text = shown_odd(written(tmp_path), capsys)
    assert text.startswith("  rank 1: it failed: KeyError at dp_runtime/runner/step_loop.py:")
    assert "secret" not in written(tmp_path).read_text()


def test_idle_ranks_are_well(model: Path) -> None:
    with engine(model, "thread") as one:
        wait_until(lambda: {r.phase for r in one.flight_record().ranks} == {"idle"}, "idle")
        assert diagnose(one.flight_record()) == ()


def test_a_directory_that_can_not_be_written_to_is_refused(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for wrong in (str(file), f"{file}/in", "a\0b"):
        with pytest.raises(ValueError, match=r"^flight_dump_dir: "):
            engine(model, "thread", flight_dump_dir=wrong)
