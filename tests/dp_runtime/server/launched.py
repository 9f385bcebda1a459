"""`launch.py serve` in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, sleep

import httpx
import psutil

from tests.dp_runtime.server.served import WAIT_S

ROOT = Path(__file__).parents[3]


@dataclass(eq=False)
class Launched:
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)  # of stdout and stderr
    seen: set[psutil.Process] = field(default_factory=set)  # it and what it has started

    def __post_init__(self) -> None:
        self._this = psutil.Process(self.process.pid)  # and no later process of this number
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def url(self) -> str:
        return self.wait_for(r"listening on (http://\S+):")[1]

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait for a line that has this."""
        deadline = monotonic() + WAIT_S
        while not (found := re.search(pattern, self.text)):
            assert self.process.poll() is None, self.text
            assert monotonic() < deadline, self.text
            self.look()
            sleep(0.02)
        return found

    def look(self) -> list[psutil.Process]:
        """It and the processes that it has started, now and in earlier looks."""
        with suppress(psutil.NoSuchProcess):
            self.seen |= {self._this, *self._this.children(recursive=True)}
        return [each for each in self.seen if each.is_running()]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """Wait for its exit status; nothing that it has started may be left."""
        code = self.process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        _, left = psutil.wait_procs(self.seen, WAIT_S)
        assert not left, left
        assert "Traceback" not in self.text, self.text
        return code

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=WAIT_S)


@contextmanager
def launched(*flags: str, **environment: str) -> Iterator[Launched]:
    command = [sys.executable, str(ROOT / "launch.py"), "serve", "--port", "0", *flags]
    given = dict(os.environ) | environment
    process = subprocess.Popen(
        command, cwd=ROOT, env=given, text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    server = Launched(process)
    try:
        yield server
    finally:
        for process in server.look():
            process.kill()
        server.process.wait(WAIT_S)
        server._reader.join(WAIT_S)
