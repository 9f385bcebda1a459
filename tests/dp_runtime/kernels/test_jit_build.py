import subprocess
import sys

import pytest

TRY = """
from dp_runtime.kernels.jit_build import forbid_compilation
forbid_compilation()
import os
assert os.environ["FLASHINFER_DISABLE_JIT"] == "1"
from triton import knobs
knobs.runtime.jit_cache_hook(
    key="", repr="some_kernel[num_warps=4](x: *fp32)", fn=None, compile={}, is_manual_warmup=False,
    already_compiled=False,
)
"""


def test_a_late_triton_kernel_is_an_error_that_names_it() -> None:
    pytest.importorskip("triton")
    tried = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True)
    assert tried.returncode == 1
    error = tried.stderr.splitlines()[-1]
    assert error.startswith("RuntimeError: the Triton kernel some_kernel[num_warps=4](x: *fp32)")
