"""The server under test: `launch.py serve` as a process of its own, whose ranks can be killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import httpx

from dp_runtime.cli.top.scrape import Scrape
from dp_runtime.errors import ServerSilent

LAUNCH = Path(__file__).parents[2] / "launch.py"
POLL_S, IDLE_S, STOP_S, ASK_S = 0.1, 5.0, 60.0, 30.0
TAIL = 2000  # characters of the log, where the server has failed


@dataclass(frozen=True)
class Loss:
    """A rank that was killed, and how long it took until all ranks served again."""

    dp_rank: int
    pid: int
    num_running: int  # of its requests
    seconds: float
    before: Scrape  # what had been counted: whoever has its place counts anew


@dataclass(frozen=True)
class Server:
    url: str

    def health(self) -> dict[str, Any]:
        answer: dict[str, Any] = httpx.get(f"{self.url}/health", timeout=ASK_S).json()
        return answer

    def scrape(self, timeout_s: float) -> Scrape:
        """Scrape, and again where the server of a busy machine does not answer in time."""
        deadline = monotonic() + timeout_s
        while True:
            try:
                return Scrape.of(self.url)
            except ServerSilent:
                if monotonic() > deadline:
                    raise
                sleep(POLL_S)

    def scrape_when_idle(self) -> Scrape | None:
        """Scrape once no rank has requests, or as it is after a while; None if nobody answers."""
        deadline = monotonic() + IDLE_S
        try:
            while (counted := self.scrape(IDLE_S)).sum("dp_runtime_requests_running"):
                if monotonic() > deadline:
                    break
                sleep(POLL_S)
        except ServerSilent:
            return None
        return counted

    def kill_a_rank(self, timeout_s: float) -> Loss:
        """Send SIGKILL to the rank with most requests, and wait until all serve again."""
        before = self.scrape(timeout_s)
        ranks = [rank for rank in self.health()["ranks"] if rank["pid"]]  # those that answer
        victim = max(ranks, key=lambda rank: rank["running"])
        epoch, start = max(rank["epoch"] for rank in ranks), monotonic()
        os.kill(victim["pid"], signal.SIGKILL)
        while not self._serves_after(epoch):
            if monotonic() > start + timeout_s:
                raise TimeoutError(f"{victim} was not replaced within {timeout_s:g} s")
            sleep(POLL_S)
        lost = victim["dp_rank"], victim["pid"], victim["running"]
        return Loss(*lost, monotonic() - start, before)

    def _serves_after(self, epoch: int) -> bool:
        health = self.health()
        later = all(rank["epoch"] > epoch for rank in health["ranks"])
        return bool(later and health["status"] == "ok")


@contextmanager
def serving(flags: Sequence[str], log: Path, timeout_s: float) -> Iterator[Server]:
    """Start a server, whose output goes to a file; it and its ranks end with the block."""
    command = [sys.executable, str(LAUNCH), "serve", "--port", "0", *flags]
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield Server(_url_when_ready(process, log, timeout_s))
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()


def _url_when_ready(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> str:
    deadline = monotonic() + timeout_s
    while not re.search(r"^ready: ", text := log.read_text(), re.MULTILINE):
        if process.poll() is not None:
            raise ChildProcessError(f"the server has ended: {text[-TAIL:]}")
        if monotonic() > deadline:
            raise TimeoutError(f"the server is not ready after {timeout_s:g} s: {text[-TAIL:]}")
        sleep(POLL_S)
    found = re.search(r"^listening on (http://\S+):", text, re.MULTILINE)
    assert found, "a server that is ready has said where it listens"
    return found[1]
