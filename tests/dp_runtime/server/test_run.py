"""`launch.py serve` as a process: what it prints, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.dp_runtime.server.served import WAIT_S

ROOT = Path(__file__).parents[3]
LONG = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}


@contextmanager
def served_by(launcher: str, *more: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    flags = ["--launcher", launcher, "--dp-size", "2", "--port", "0", *more]
    process = subprocess.Popen(
        [sys.executable, "launch.py", "serve", *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1] == "ready: tiny_model on 2 ranks\n"
        assert lines[0].startswith("listening on http://127.0.0.1:")
        yield process, lines[0].split()[2].rstrip(":")
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "launcher", ["thread", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow])]
)
def test_running_streams_end_before_a_server_that_is_told_to_stop(launcher: str) -> None:
    with (
        served_by(launcher) as (process, url),
        httpx.Client(base_url=url, timeout=WAIT_S) as client,
    ):
        with client.stream("POST", "/v1/completions", json=LONG) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(WAIT_S) == 0
