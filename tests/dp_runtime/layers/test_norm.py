"""RMSNorm: its values, and who owns the residual, the same on every device."""

from __future__ import annotations

import pytest
import torch

from dp_runtime.layers.norm import RMSNorm

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=(pytest.mark.gpu, no_gpu))]


@pytest.mark.parametrize("device", DEVICES)
def test_the_sum_overwrites_the_residual(device: str) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(5, 64), torch.randn(5, 64), torch.rand(64)
    norm, own = RMSNorm(weight.to(device), 1e-6), residual.to(device, copy=True)
    before = x.to(device, copy=True)
    normed, total = norm.add(before, own)
    assert total.data_ptr() == own.data_ptr()
    torch.testing.assert_close(own.cpu(), x + residual)
    due = (x + residual).double()
    due = due / (due.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    torch.testing.assert_close(normed.cpu().double(), due, atol=1e-5, rtol=1e-5)
    assert torch.equal(before.cpu(), x), "what is added stays as it is"


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_residual_the_row_is_the_sum(device: str) -> None:
    x = torch.randn(5, 64, device=device)
    before = x.clone()
    _, total = RMSNorm(torch.ones(64, device=device), 1e-6).add(x, None)
    assert total is x
    assert torch.equal(x, before)


def test_a_gain_in_float32_is_applied_before_the_only_rounding() -> None:
    torch.manual_seed(1)
    x, gain = torch.randn(64, 96).bfloat16(), 1 + torch.randn(96) * 2**-7
    scale = (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
    found, due = RMSNorm(gain, 1e-6)(x), (x.double() * scale * gain.double()).bfloat16()
    assert found.dtype == torch.bfloat16
    assert (found != due).float().mean() < 0.002, "only where float32 was level"
    rounded = RMSNorm(gain.bfloat16(), 1e-6)(x)
    assert (rounded != due).float().mean() > 0.2
