"""Engines for the tests of processes, and drivers of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from collectives.session import VARIABLE, session_token
from dp_runtime import Engine, EngineConfig, SamplingParams

REPOSITORY = Path(__file__).parents[2]
LAUNCH = (sys.executable, "launch.py")
ENDLESS = SamplingParams(max_tokens=60_000, temperature=0.0, ignore_eos=True)
TOLD_S = 30.0  # half of a step's default timeout: who is told by then is told of the loss itself
SHORT = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)


def engine(model: Path, launcher: str, dp_size: int = 2, **fields: Any) -> Engine:
    """An engine whose page pools hold one endless request each, and which replaces no rank."""
    own = {"max_num_requests": 4, "num_pages": 1100, "torch_threads": 1, "max_recoveries": 0}
    fields = own | {"hang_timeout_s": fields.get("step_timeout_s", 5.0)} | fields
    return Engine(EngineConfig(str(model), dp_size=dp_size, launcher=launcher, **fields))


class Driver:
    """A `launch.py generate` of endless requests, in a process group like a shell's job.

    command: what runs in place of `launch.py`.
    As a context manager it ends with the test, however the test ends.
    """

    def __init__(
        self, model: Path, room: Path, dp_size: int, *flags: str, command: Sequence[str] = LAUNCH
    ) -> None:
        prompts = room / "prompts.jsonl"
        line = {"prompt_token_ids": [1, 2, 3], "max_tokens": 60_000, "ignore_eos": True}
        prompts.write_text((json.dumps(line) + "\n") * 4)
        self.process = subprocess.Popen(
            [
                *(*command, "generate", "--model", str(model)),
                *("--prompts", str(prompts), "--dp-size", str(dp_size), "--num-pages", "1100"),
                *("--max-num-requests", "4", *flags),
            ],
            cwd=REPOSITORY,
            env=os.environ | {VARIABLE: session_token()},
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
            self.end()

    def signal(self, number: int) -> None:
        """Send a signal to the whole group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; exit status and what it wrote to stdout and to stderr."""
        shown, errors = self.process.communicate(timeout=100)
        return self.process.returncode, shown, errors
