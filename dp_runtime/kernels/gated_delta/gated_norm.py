"""RMSNorm of each v head's outputs, then their gate, in one launch."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    overlaps,
)

HEADS_AT_ONCE = 16


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """Compute RMSNorm(x) * silu(z) -> `out` [rows, heads * dim], by default a new tensor.

    x [rows, heads, dim] and z [rows, heads * dim], whose rows may lie apart. The quotient is
    rounded to the weight's dtype and the norm to x's, as the models were trained.
    """
    rows, heads, dim = x.shape
    assert x.is_contiguous(), "x is contiguous"
    assert z.stride(1) == 1, "a row is in one piece"
    if out is None:
        out = torch.empty(rows, heads * dim, dtype=x.dtype, device=x.device)
    assert out.is_contiguous(), "outputs are contiguous"
    assert out.shape == (rows, heads * dim), f"outputs of {tuple(out.shape)} for {rows} rows"
    if rows:
        pdl = overlaps(x.device)
        launch(
            _gated_rms_norm_kernel, (rows, -(-heads // HEADS_AT_ONCE), 1),
            (x, z, weight, out, z.stride(0), eps), _constants(heads, dim, pdl),
            num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return out


@cache
def _constants(heads: int, dim: int, pdl: bool) -> Mapping[str, int]:
    return {
        "NUM_HEADS": heads, "HEADS": HEADS_AT_ONCE, "DIM": dim,
        "BLOCK": triton.next_power_of_2(dim), "PDL": pdl,
    }  # fmt: skip


@triton.jit
def _gated_rms_norm_kernel(
    x, z, weight, out, z_stride, eps,
    NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    dim = tl.arange(0, BLOCK)[None, :]
    gain = tl.load(weight + dim, mask=dim < DIM, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    inside = (head < NUM_HEADS) & (dim < DIM)
    at = head * DIM + dim
    dtype = x.dtype.element_ty
    value = tl.load(x + row * NUM_HEADS * DIM + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(z + row * z_stride + at, mask=inside, other=0.0).to(tl.float32)
    quotient = value * tl.rsqrt(tl.sum(value * value, 1)[:, None] / DIM + eps)
    normed = (quotient.to(weight.dtype.element_ty).to(tl.float32) * gain).to(dtype)
    gated = normed.to(tl.float32) * (gate / (1.0 + tl.exp(-gate)))
    tl.store(out + row * NUM_HEADS * DIM + at, gated.to(dtype), mask=inside)
