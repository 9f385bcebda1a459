"""Signals whose effect a test depends on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def stop(pid: int) -> None:
    """Send SIGSTOP and wait until every thread is stopped: kill(2) returns before they are."""
    os.kill(pid, signal.SIGSTOP)
    give_up = time.monotonic() + 10
    while running := [thread for thread in Path(f"/proc/{pid}/task").iterdir() if _runs(thread)]:
        assert time.monotonic() < give_up, f"still running after SIGSTOP: {running}"
        time.sleep(0.001)


def _runs(thread: Path) -> bool:
    state = thread.joinpath("stat").read_text().rpartition(")")[2].split()[0]
    return state not in "TtZX"
