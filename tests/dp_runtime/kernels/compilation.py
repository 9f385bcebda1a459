"""Compiles kernels for a GPU where there is none."""

from __future__ import annotations

import os
import subprocess
import sys


def lines_of(module: str) -> list[str]:
    """Run a module that compiles kernels, and return what it printed.

    In a process of its own: whether Triton interprets is decided as it is imported.
    """
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()
