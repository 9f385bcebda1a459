"""Gates in Triton, which round once: by column, and of a whole row with the sum behind it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, launch, overlaps

COLUMNS_AT_ONCE = 1024


def multiply_gate(x: Tensor, gate: Tensor, silu: bool) -> Tensor:
    """Compute x * silu(gate), or x * sigmoid(gate), of [rows, size] whose rows may lie apart."""
    rows, size = x.shape
    assert x.stride(1) == gate.stride(1) == 1, "a row is in one piece"
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    if rows:
        block, pdl = min(triton.next_power_of_2(size), COLUMNS_AT_ONCE), overlaps(x.device)
        launch(
            _multiply_gate_kernel, (rows, -(-size // block), 1),
            (x, gate, out, size, x.stride(0), gate.stride(0)),
            {"SILU": silu, "BLOCK": block, "PDL": pdl},
            num_warps=max(block // 256, 1), launch_pdl=pdl,
        )  # fmt: skip
    return out


def add_gated(out: Tensor, routed: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Compute routed + sigmoid(x @ weight.T) * out, [rows, hidden], in the place of `out`.

    weight [1, hidden]. The last kernel before wrote neither out nor x: they are read while it ends.
    """
    rows, hidden = out.shape
    together = {"out": out, "routed": routed, "x": x, "weight": weight}
    for name, tensor in together.items():
        assert tensor.is_contiguous(), f"{name} is contiguous"
    assert out.shape == routed.shape == x.shape, f"{out.shape}, {routed.shape} and {x.shape}"
    if rows:
        block, pdl = triton.next_power_of_2(hidden), overlaps(out.device)
        launch(
            _add_gated_kernel, (rows, 1, 1), (out, routed, x, weight, hidden),
            {"BLOCK": block, "PDL": pdl},
            num_warps=min(max(block // 512, 1), 8), launch_pdl=pdl,
        )  # fmt: skip
    return out


@triton.jit
def _multiply_gate_kernel(
    x, gate, out, size, x_stride, gate_stride,
    SILU: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    by = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    value *= (by if SILU else 1.0) / (1.0 + tl.exp(-by))
    tl.store(out + row * size + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_gated_kernel(
    out, routed, x, weight, hidden, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gain = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    own = tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-tl.sum(value * gain, 0)))
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.load(routed + at, mask=inside, other=0.0).to(tl.float32) + share * own
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
