"""Which kernels run the experts, and what they say they need."""

from __future__ import annotations

import pytest
import torch

from dp_runtime.layers import moe_kernels
from dp_runtime.layers.moe_kernels import choose_moe_backend

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture(params=[True, False], ids=["with triton", "without triton"])
def installed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    found = object() if request.param else None
    monkeypatch.setattr(moe_kernels, "find_spec", lambda name: found)
    return bool(request.param)


def test_auto_takes_triton_for_two_byte_types_on_a_gpu(installed: bool) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        name, reason = choose_moe_backend("auto", dtype, GPU)
        assert name == ("triton" if installed else "torch")
        assert ("not installed" in reason) != installed
    assert choose_moe_backend("auto", torch.float32, GPU)[0] == "torch"
    assert choose_moe_backend("auto", torch.bfloat16, CPU)[0] == "torch"
    assert choose_moe_backend("torch", torch.bfloat16, GPU)[0] == "torch"


@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, CPU), (torch.float32, GPU)])
def test_triton_is_refused_where_it_can_not_run(
    dtype: torch.dtype, device: torch.device, installed: bool
) -> None:
    with pytest.raises(ValueError, match="moe_backend: 'triton' is not allowed"):
        choose_moe_backend("triton", dtype, device)


def test_triton_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="triton is not installed"):
        choose_moe_backend("triton", torch.bfloat16, GPU)
