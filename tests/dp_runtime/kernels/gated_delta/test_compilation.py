"""The kernels compile for a GPU where there is none."""

from __future__ import annotations

import pytest

from tests.dp_runtime.kernels.compilation import lines_of

pytest.importorskip("triton", reason="triton is not installed")


@pytest.mark.slow
def test_the_kernels_compile_for_sm90() -> None:
    lines = lines_of(f"{__package__}.compile_all")
    compiled = {line.split(":")[0] for line in lines}
    names = ("convolve", "step", "solve", "state", "gated_rms_norm", "copy")
    assert compiled == {f"_{name}_kernel" for name in names}
