"""Kernels of experts and of attention by chunks compile for a GPU where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_the_kernels_compile_for_sm90() -> None:
    """In a process of its own: whether Triton interprets is decided as it is imported."""
    module = f"{__package__}.compile_experts"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    for kernel in ("gate_up_kernel", "down_kernel"):
        assert sum(line.startswith(f"{kernel}: ") for line in lines) == 18
    for kernel in ("split_kernel", "combine_kernel"):
        assert sum(line.startswith(f"{kernel}: ") for line in lines) == 4
