"""Rows times an e4m3 matrix in Triton, in one launch, and the matrix widened.

Each row of the matrix has a scale for each 128 inputs, by which the product of these is multiplied
in float32; its inputs are in the order of `interleave`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.kernels.dense_linear.parts import add_parts, leave_part
from dp_runtime.kernels.expert_products import regroup, widen, zeros
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait
from dp_runtime.weights.fp8_blocks import BLOCK

SCALE_BLOCK = tl.constexpr(BLOCK)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x, weight, weight_blocks, scales, out, sums, counters,
    rows, outputs, inputs, x_stride, out_stride, split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, SWAP: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile, part = tl.program_id(0) // split, tl.program_id(0) % split
    m = tile % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile // row_blocks * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    share = tl.cdiv(tl.cdiv(inputs, SCALE_BLOCK), split) * SCALE_BLOCK
    total = _part_of_tile(
        x, weight, weight_blocks, scales, m, first, n, rows, outputs, inputs, x_stride,
        part * share, tl.minimum(inputs, (part + 1) * share), BLOCK_M, BLOCK_N, BLOCK_K, SWAP, EVEN,
    )  # fmt: skip
    inside = (m < rows)[:, None] & (n < outputs)
    if SPLIT:
        at = m.to(tl.int64)[:, None] * outputs + n
        size = rows.to(tl.int64) * outputs
        at += sums
        if leave_part(total, at + part * size, inside, counters + tile, split):
            total = add_parts(at, size, inside, counters + tile, split, 1)
            _store(total, out, m, n, out_stride, inside)
    else:
        _store(total, out, m, n, out_stride, inside)


@triton.jit
def _part_of_tile(
    x, weight, weight_blocks, scales, m, first, n, rows, outputs, inputs, x_stride, begin, end,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows with one of outputs, over inputs begin to end: float32."""
    k = tl.arange(0, BLOCK_K)
    x_at = x + tl.where(m < rows, m, 0).to(tl.int64)[:, None] * x_stride + k
    weight_at = weight + tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * inputs + k
    scale_at = scales + tl.where(n < outputs, n, 0)
    total = zeros(BLOCK_M, BLOCK_N, SWAP)
    scale = tl.load(scale_at + begin // SCALE_BLOCK * outputs)
    for start in range(begin, end, BLOCK_K):
        # The next scales are asked for before the product, which does not have to wait for them.
        following = tl.minimum(start + BLOCK_K, inputs - 1) // SCALE_BLOCK
        next_scale = tl.load(scale_at + following * outputs)
        if EVEN:
            a = tl.load(x_at + start)
        else:
            a = tl.load(x_at + start, mask=(start + k < inputs)[None, :], other=0.0)
        if weight_blocks is not None:
            b = weight_blocks.load([first, start])
        elif EVEN:
            b = tl.load(weight_at + start)
        else:
            b = tl.load(weight_at + start, mask=(start + k < inputs)[None, :], other=0.0)
        b = widen(regroup(b), a.dtype)
        if SWAP:
            total += tl.dot(b, a.T, input_precision="ieee") * scale[:, None]
        else:
            total += tl.dot(a, b.T, input_precision="ieee") * scale[None, :]
        scale = next_scale
    if SWAP:
        total = total.T
    return total


@triton.jit
def _store(total, out, m, n, out_stride, inside):
    at = out + m.to(tl.int64)[:, None] * out_stride + n
    tl.store(at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def widen_kernel(
    weight, scales, out, outputs, inputs,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = block * SCALE_BLOCK + tl.arange(0, SCALE_BLOCK)
    at = n.to(tl.int64)[:, None] * inputs + k
    inside = (n < outputs)[:, None] & (k < inputs)
    scale = tl.load(scales + block.to(tl.int64) * outputs + n, mask=n < outputs, other=0.0)
    values = regroup(tl.load(weight + at, mask=inside, other=0.0))
    values = widen(values, out.dtype.element_ty)
    wide = values.to(tl.float32) * scale[:, None]
    tl.store(out + at, wide.to(out.dtype.element_ty), mask=inside)
