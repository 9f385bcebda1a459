"""The kernels compile for a GPU where there is none."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_the_kernels_compile_for_sm90() -> None:
    """In a process of its own: whether Triton interprets is decided as it is imported."""
    module = f"{__package__}.compile_all"
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = {line.split(":")[0] for line in done.stdout.splitlines()}
    names = ("convolve", "step", "solve", "state", "gated_rms_norm", "copy")
    assert compiled == {f"_{name}_kernel" for name in names}
