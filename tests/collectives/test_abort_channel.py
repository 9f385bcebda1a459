"""The line between ranks: alarms, and leaving together."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch._C._distributed_c10d import FileStore

from collectives.torch_distributed.abort_channel import AbortChannel

SECRET = b"of these three"


@pytest.fixture
def heard() -> list[str]:
    return []


@pytest.fixture
def lines(tmp_path: Path, heard: list[str]) -> Iterator[list[AbortChannel]]:
    """The lines of three ranks, which note alarms."""
    lines: list[AbortChannel] = []

    def connect(rank: int) -> None:
        store = FileStore(str(tmp_path / "store"), 3)
        lines.append(AbortChannel(store, rank, 3, "127.0.0.1", 10.0, SECRET, heard.append))

    threads = [threading.Thread(target=connect, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield lines
    for line in lines:
        line.close()


def test_ranks_leave_when_the_last_one_does(lines: list[AbortChannel], heard: list[str]) -> None:
    left: list[float] = []

    def leave(line: AbortChannel) -> None:
        line.leave(10.0)
        left.append(time.monotonic())

    early = [threading.Thread(target=leave, args=(line,)) for line in lines[:2]]
    for thread in early:
        thread.start()
    time.sleep(0.3)
    assert not left
    lines[2].leave(10.0)
    for thread in early:
        thread.join(5)
    assert len(left) == 2
    assert heard == []


def test_a_rank_that_is_gone_keeps_nobody(lines: list[AbortChannel]) -> None:
    lines.pop().close()
    threading.Thread(target=lines[0].leave, args=(10.0,)).start()
    start = time.monotonic()
    lines[1].leave(10.0)
    assert time.monotonic() - start < 5


def test_a_rank_that_does_not_leave_is_waited_for_so_long(lines: list[AbortChannel]) -> None:
    start = time.monotonic()
    lines[0].leave(0.3)
    assert 0.3 <= time.monotonic() - start < 5


def test_an_alarm_is_heard_after_a_peer_has_left(
    lines: list[AbortChannel], heard: list[str]
) -> None:
    lines[0].leave(0.05)
    lines[1].sound("rank 1 is lost")
    deadline = time.monotonic() + 5
    while len(heard) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert heard == ["rank 1 is lost"] * 2


def test_a_connection_without_the_secret_is_dropped_and_the_store_does_not_tell_it(
    tmp_path: Path, heard: list[str]
) -> None:
    path, lines = str(tmp_path / "store"), []

    def connect(rank: int) -> None:
        place = (rank, 2, "127.0.0.1", 10.0)
        lines.append(AbortChannel(FileStore(path, 2), *place, SECRET, heard.append))

    first = threading.Thread(target=connect, args=(0,))
    first.start()
    store = FileStore(path, 2)
    port, host = store.get("alarm/0").decode().split()
    assert not store.check(["alarm/token"])
    with socket.create_connection((host, int(port)), 10.0) as stranger:
        stranger.sendall(hashlib.sha256(b"a guess").digest()[:16])
        assert stranger.recv(1) == b"", "the rank hangs up"
    assert first.is_alive()
    connect(1)
    first.join(10)
    assert len(lines) == 2
    for line in lines:
        line.close()


def test_strangers_that_say_little_or_nothing_hold_up_nobody(
    tmp_path: Path, heard: list[str]
) -> None:
    path, lines = str(tmp_path / "store"), []

    def connect(rank: int) -> None:
        place = (rank, 2, "127.0.0.1", 10.0)
        lines.append(AbortChannel(FileStore(path, 2), *place, SECRET, heard.append))

    first = threading.Thread(target=connect, args=(0,))
    first.start()
    port, host = FileStore(path, 2).get("alarm/0").decode().split()
    strangers = [socket.create_connection((host, int(port)), 10.0) for _ in range(6)]
    for stranger, said in zip(strangers, (b"", b"", b"x", b"GET / HTTP/1.1\r\n\r\n", b"\0" * 999)):
        stranger.sendall(said)
    connect(1)
    first.join(10)
    assert len(lines) == 2
    assert heard == []
    for line in lines:
        line.close()
    for stranger in strangers:
        stranger.close()
