"""`serve --trace`: the steps of a server, written as it stops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dp_runtime.cli.main import main
from dp_runtime.engine.async_engine import AsyncEngine
from dp_runtime.server.state import ServerState
from tests.traces import check_trace


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The server's own end with the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_server_writes_its_trace_when_it_is_told_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("uvicorn")
    serves = ServerState.serve

    def stop_soon(state: ServerState, engine: AsyncEngine) -> None:
        serves(state, engine)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        monkeypatch.undo()

    monkeypatch.setattr(ServerState, "serve", stop_soon)
    file = tmp_path / "trace.json"
    flags = ("--launcher", "thread", "--dp-size", "2", "--port", "0", "--trace", str(file))
    assert main(["serve", *flags]) == 0
    named = [e for e in check_trace(file.read_text()) if e["name"] == "process_name"]
    assert [e["args"]["name"][:7] for e in named] == ["rank 0 ", "rank 1 "]
