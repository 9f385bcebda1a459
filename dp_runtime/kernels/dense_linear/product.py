"""Few rows times a matrix in Triton, each program with its part of the inputs.

Weights are the first operand, whose blocks have 64 rows at least: products are transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.kernels.dense_linear.parts import add_parts, leave_part
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait

PARTS_AT_ONCE = tl.constexpr(4)


@triton.jit(do_not_specialize=["rows", "split"])
def product_kernel(
    x, weight, out, sums, counters,
    rows, outputs, inputs, x_stride, out_stride, share, split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile, part = tl.program_id(0) // split, tl.program_id(0) % split
    m = tile % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile // row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = part * share, tl.minimum(inputs, (part + 1) * share)
    x_at = x + tl.where(m < rows, m, 0).to(tl.int64)[:, None] * x_stride
    weight_at = weight + tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * inputs
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in range(begin, end, BLOCK_K):
        a = _load(x_at, start, end, BLOCK_K, EVEN)
        b = _load(weight_at, start, end, BLOCK_K, EVEN)
        total = tl.dot(b, a.T, total, input_precision="ieee")
    if SPLIT:
        area: tl.constexpr = BLOCK_M * BLOCK_N
        of_tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)
        at = sums + (tile * split).to(tl.int64) * area + of_tile
        everywhere = tl.full((BLOCK_N, BLOCK_M), 1, tl.int1)
        if leave_part(total, at + part * area, everywhere, counters + tile, split):
            total = add_parts(at, area, everywhere, counters + tile, split, PARTS_AT_ONCE)
            _store(total.T, out, m, n, rows, outputs, out_stride)
    else:
        _store(total.T, out, m, n, rows, outputs, out_stride)


@triton.jit
def _load(at, start, end, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    k = start + tl.arange(0, WIDTH)
    if EVEN:
        return tl.load(at + k)
    else:  # noqa: RET505 - the branch is chosen while compiling
        return tl.load(at + k, mask=(k < end)[None, :], other=0.0)


@triton.jit
def _store(total, out, m, n, rows, outputs, out_stride):
    at = out + m.to(tl.int64)[:, None] * out_stride + n
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs))
