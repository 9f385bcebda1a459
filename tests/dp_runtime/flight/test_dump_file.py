"""Files of flight records: written once, read as written, and refused in one line."""

from __future__ import annotations

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dp_runtime.cli.main import main
from dp_runtime.flight.dump_file import read_dump, write_dump
from dp_runtime.flight.record import ProcessState, RankFlight, Source
from tests.dp_runtime.flight.flights import Clock, Flights


@pytest.fixture
def dump_path(clock: Clock, tmp_path: Path) -> Path:
    flights = Flights(clock)
    flights.step(2)
    path = tmp_path / "dump.jsonl"
    write_dump(flights.dump(), path)
    return path


def test_a_file_says_what_was_taken(clock: Clock, tmp_path: Path) -> None:
    flights = Flights(clock)
    flights.step(3)
    dump = flights.dump(reason="rank 2 ended 'é'")
    lost = RankFlight(3, Source.NONE, ProcessState.ENDED, 1.25)
    dump = replace(dump, ranks=(*dump.ranks[:3], lost))
    path = tmp_path / "dump.jsonl"
    write_dump(dump, path)
    assert read_dump(path) == dump
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_dump(dump, path)


def test_doctor_finds_nothing_odd(dump_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(dump_path)]) == 0
    shown = capsys.readouterr().out
    assert "Flight record of 4 ranks" in shown
    assert "No rank is odd." in shown


def refused(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["doctor", str(path)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_every_file_that_is_cut_off_is_refused(
    dump_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = dump_path.read_bytes()
    lines = content.splitlines(keepends=True)
    ends = [0, 5, *(sum(map(len, lines[:count])) for count in range(1, len(lines)))]
    for end in (*ends, len(content) // 2, len(content) - 20):
        dump_path.write_bytes(content[:end])
        error = refused(dump_path, capsys)
        assert "the file is cut off" in error


HEAD = {"format": "dp-runtime flight record", "version": 1, "reason": "", "taken_us": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[1, 2]\n", "a flight record"),
        (b"{}\n", "a flight record"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b'{"format": ' + b"9" * 10_000 + b"}\n", "not JSON"),
        (json.dumps(HEAD | {"version": 2}).encode() + b"\n", "version: 2"),
        (json.dumps(HEAD | {"num_ranks": 10**9}).encode() + b"\n", "num_ranks"),
        (json.dumps(HEAD | {"num_ranks": True}).encode() + b"\n", "num_ranks"),
        (json.dumps(HEAD | {"num_ranks": 1, "taken_us": -5}).encode() + b"\n{}\n", "line 2"),
    ],
)
def test_what_is_no_flight_record_is_refused(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dump"
    path.write_bytes(content)
    assert message in refused(path, capsys)


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such file" in refused(tmp_path / "none", capsys)
    assert "Is a directory" in refused(tmp_path, capsys)


WRONG: list[Any] = [None, -1, 2**80, 1.5, float("nan"), "x\n\x1b[31m", [], [[1]], {}, True]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_a_wrong_value_anywhere_is_refused_or_shown(
    wrong: Any, dump_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each field of a rank, a step, a pass and a collective in turn; none ends in a traceback."""
    head, first, *rest = dump_path.read_text().splitlines()
    rank = json.loads(first)
    step = rank["steps"][-1]
    for of in (rank, step, step["passes"][0], step["collectives"][0]):
        for name in of if isinstance(of, dict) else range(len(of)):
            before, of[name] = of[name], wrong
            dump_path.write_text("\n".join([head, json.dumps(rank), *rest, ""]))
            of[name] = before
            status = main(["doctor", str(dump_path)])
            out, error = capsys.readouterr()
            assert status in (0, 1) or (status == 2 and error.count("\n") == 1), name
            assert "\x1b" not in out + error
