"""RMSNorm in Triton, with the residual sum before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, overlaps


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add x [rows, size] to `residual`, if given, in place; return the RMSNorm of the sum.

    The weight's dtype is that of x or float32, as in `core.qk_norm_rope.rms_norm`.
    """
    assert x.is_contiguous(), "x is contiguous"
    out = torch.empty_like(x)
    rows, size = x.shape
    if rows:
        block, pdl = triton.next_power_of_2(size), overlaps(x.device)
        _add_rms_norm_kernel[(rows,)](
            x, residual, weight, out, size, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block, PDL=pdl,
            num_warps=min(max(block // 512, 1), 8), launch_pdl=pdl,
        )  # fmt: skip
    return out


@triton.jit
def _add_rms_norm_kernel(
    x, residual, weight, out, size, eps,
    HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < size
    scale = tl.load(weight + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    dtype = x.dtype.element_ty
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)  # sum and quotient rounded, as models were trained
        tl.store(residual + at, value.to(dtype), mask=inside)
    quotient = value * tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    quotient = quotient.to(weight.dtype.element_ty).to(tl.float32)
    tl.store(out + at, (quotient * scale).to(dtype), mask=inside)
