"""The process that forks ranks: what children see, how their ends are told, and its own end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
import pytest

from dp_runtime.errors import StartError
from tests.signals import stop
from tests.workers.engines import REPOSITORY
from tests.workers.leftovers import wait_until
from workers import forkserver, local_group
from workers.forkserver import ForkServer

TELL = "tests.workers.forked:tell"
DRIVER = """
import json, os, signal, sys, time
from dp_runtime.config import EngineConfig
from workers import local_group
from workers.forkserver import ForkServer
from workers.messages import ReadHealth
server = ForkServer("tests.workers.forked")
children = [server.fork("tests.workers.forked:tell", f"dp-rank-{i}", 60.0) for i in range(2)]
told = [channel.recv() for process, channel in children]
if os.fork() == 0:  # holds the driver's ends of all channels
    time.sleep(60)
local_group._fork = local_group._spawn
fresh = local_group.ProcessRank(0, EngineConfig("x"), "cpu")
told.append({"pid": fresh.call(ReadHealth()).result().pid})
for one in told[1:]:
    os.kill(one["pid"], signal.SIGSTOP)
if sys.argv[1:]:
    os.kill(told[0]["server"], signal.SIGSTOP)
print(json.dumps(told), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def servers() -> Iterator[list[ForkServer]]:
    started: list[ForkServer] = []
    yield started
    for one in started:
        one.close()


@pytest.fixture
def server(servers: list[ForkServer]) -> ForkServer:
    """One that several tests use, or another after a test that has ended it."""
    if not (servers and servers[-1].usable):
        servers.append(ForkServer("tests.workers.forked", "torch"))
    return servers[-1]


def test_a_child_sees_what_the_driver_has_now(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("DP_RUNTIME_TEST", value)
        monkeypatch.chdir(tmp_path if value == "two" else REPOSITORY)
        process, channel = server.fork(TELL, "dp-rank-7", 60.0)
        told: dict[str, Any] = channel.recv()
        assert (told["variable"], told["directory"]) == (value, os.getcwd())
        assert told["blas_threads"] == os.environ.get("OPENBLAS_NUM_THREADS")
        assert told["pid"] == process.pid
        assert told["leads_session"]
        assert told["torch"], "it need not import what the server has"
        assert told["threads"] == 1
        assert told["main"] == forkserver.__file__, "not the caller's script"
        assert psutil.Process(process.pid).name() == "dp-rank-7"
        channel.send(0)
        assert process.wait(10) == 0


def test_how_a_child_ended(server: ForkServer) -> None:
    first, second = (server.fork(TELL, f"dp-rank-{rank}", 60.0) for rank in range(2))
    with pytest.raises(subprocess.TimeoutExpired):
        first[0].wait(0.01)
    first[0].kill()
    assert first[0].wait(10) == -signal.SIGKILL
    first[0].kill()
    assert first[0].wait() == -signal.SIGKILL
    second[1].recv()
    second[1].send(3)
    assert second[0].wait(10) == 3


def test_one_child_waits_for_a_stopped_server(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others end at once; when the server goes on it tells again."""
    waits: list[float | None] = []

    def counted(awaited: list[Any], timeout: float | None = None) -> list[Any]:
        if len(awaited) == 1:  # the status alone: the child has ended
            waits.append(timeout)
            timeout = min(timeout or 0.0, 0.1)
        return wait(awaited, timeout)

    children = [server.fork(TELL, f"dp-rank-{rank}", 60.0) for rank in range(3)]
    assert all(channel.recv() for _, channel in children)
    stop(server._process.pid)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(forkserver, "wait", counted)
            for child, _ in children:
                child.kill()
                assert child.wait(10) == forkserver.NOT_TOLD
    finally:
        os.kill(server._process.pid, signal.SIGCONT)
    assert waits == [forkserver.TELL_S, 0.0, 0.0]
    again, channel = server.fork(TELL, "dp-rank-0", 60.0)
    channel.recv()
    channel.send(4)
    assert again.wait(10) == 4


def test_a_stopped_server_is_replaced() -> None:
    server = ForkServer("tests.workers.forked")
    stop(server._process.pid)
    with pytest.raises(StartError, match=r"dp-rank-0: no process was started within 0\.2 s"):
        server.fork(TELL, "dp-rank-0", 0.2)
    assert server._process.returncode == -signal.SIGKILL, "it has ended by now"
    assert not server.usable, "the next engine starts another"
    server.close()


def test_a_server_that_has_forked_before_is_waited_for_shortly(
    server: ForkServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    child, channel = server.fork(TELL, "dp-rank-0", 60.0)
    channel.recv()
    stop(server._process.pid)
    monkeypatch.setattr(forkserver, "FORK_S", 0.2)
    with pytest.raises(StartError, match=r"dp-rank-1: no process was started within 0\.2 s"):
        server.fork(TELL, "dp-rank-1", 600.0)
    assert not server.usable
    channel.close()
    child.kill()


def test_a_server_that_ends_slowly_is_a_start_error(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ForkServer("tests.workers.forked")

    def still_runs(timeout: float) -> int:
        raise subprocess.TimeoutExpired("the server", timeout)

    monkeypatch.setattr(server._process, "wait", still_runs)
    os.kill(server._process.pid, signal.SIGKILL)
    with pytest.raises(StartError, match=r"dp-rank-0: the process that starts .* was killed"):
        server.fork(TELL, "dp-rank-0", 60.0)
    server.close()


def test_a_server_that_can_not_import_is_a_start_error() -> None:
    server = ForkServer("tests.no_such_module")
    with pytest.raises(StartError, match=r"dp-rank-0: the process that starts ranks ended \(exit"):
        server.fork(TELL, "dp-rank-0", 60.0)
    assert not server.usable
    server.close()


def test_a_server_of_another_import_path_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    server = ForkServer("tests.workers.forked")
    assert server.usable
    monkeypatch.syspath_prepend("/elsewhere")
    assert not server.usable
    server.close()


@pytest.mark.parametrize("stopped_too", [pytest.param([], marks=pytest.mark.slow), ["server"]])
def test_all_end_with_the_driver(stopped_too: list[str]) -> None:
    """Also where a child of its program holds its sockets, and where a rank is stopped.

    One rank was forked before it was stopped, one is of a fresh interpreter.
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *stopped_too], cwd=REPOSITORY, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    processes: list[psutil.Process] = []
    try:
        assert driver.stdout is not None
        told = json.loads(driver.stdout.readline())
        processes += [psutil.Process(one["pid"]) for one in told]
        processes.append(psutil.Process(told[0]["server"]))
        driver.kill()
        driver.wait()
        wait_until(lambda: not any(map(alive, processes)), "children and server end", 20)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)  # the forked child
        end(processes)


def test_a_server_that_dies_is_replaced_before_a_rank_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local_group, "PRELOAD", ("tests.workers.forked",))
    servers: list[ForkServer] = []
    monkeypatch.setattr(local_group, "_servers", servers)
    first = local_group._fork_server()
    child, _ = first.fork(TELL, "dp-rank-0", 60.0)
    first._process.kill()
    wait_until(lambda: servers[0] is not first, "another is started")
    assert local_group._fork_server() is servers[0]
    again, channel = servers[0].fork(TELL, "dp-rank-0", 60.0)
    assert channel.recv()["server"] == servers[0]._process.pid
    for process in (child, again):
        process.kill()
    servers[0].close()
    assert not servers[0].wait_for_loss(), "nobody needs another"


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
