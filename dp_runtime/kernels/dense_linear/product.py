"""Few rows times a matrix in Triton, whose weights are asked for before the rows are there.

Some of its part's weights a program loads, the others it has the L2 fetch, and then it waits for
the kernel that writes the rows. Weights are the first operand, so products are transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.kernels.dense_linear.parts import add_parts, leave_part
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait

FETCHED = tl.constexpr(128)  # inputs of one output that the L2 is asked for at once
PARTS_AT_ONCE = tl.constexpr(4)


@triton.jit(do_not_specialize=["rows", "split"])
def product_kernel(
    x, weight, weight_blocks, held_blocks, out, sums, counters,
    rows, outputs, inputs, x_stride, out_stride, share, split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HELD: tl.constexpr,
    SPLIT: tl.constexpr, LOOP: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr,
    LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row_blocks = tl.cdiv(rows, BLOCK_M)
    tile, part = tl.program_id(0) // split, tl.program_id(0) % split
    m = tile % row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tile // row_blocks * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    begin, end = part * share, tl.minimum(inputs, (part + 1) * share)
    x_at = x + tl.where(m < rows, m, 0).to(tl.int64)[:, None] * x_stride
    weight_at = weight + tl.where(n < outputs, n, 0).to(tl.int64)[:, None] * inputs
    if PDL and AHEAD and LOOP:
        _fetch(weight_at, begin + HELD, end)
    if HELD:
        held = _load(weight_at, held_blocks, first, begin, end, HELD, EVEN)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    if HELD:
        held_rows = _load(x_at, None, 0, begin, end, HELD, EVEN)
        if PDL and LATE:
            held = _arrived(held)
        total = tl.dot(held, held_rows.T, total, input_precision="ieee")
    if LOOP:
        for start in range(begin + HELD, end, BLOCK_K):
            a = _load(x_at, None, 0, start, end, BLOCK_K, EVEN)
            b = _load(weight_at, weight_blocks, first, start, end, BLOCK_K, EVEN)
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
def _load(at, blocks, first, start, end, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    k = start + tl.arange(0, WIDTH)
    if blocks is not None:
        return blocks.load([first, start])
    elif EVEN:  # noqa: RET505 - the branch is chosen while compiling
        return tl.load(at + k)
    else:
        return tl.load(at + k, mask=(k < end)[None, :], other=0.0)


@triton.jit
def _fetch(weight_at, begin, end):
    size: tl.constexpr = weight_at.dtype.element_ty.primitive_bitwidth // 8
    for start in range(begin, end, 2 * FETCHED):
        k = start + tl.arange(0, 2) * FETCHED
        at = (weight_at + k).to(tl.int64)
        num_bytes = tl.minimum(tl.maximum(end - k, 0), FETCHED) * size
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.gt.s32 p, $2, 0; "
            "@p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
            "=r,l,r", [at, num_bytes[None, :].broadcast_to(at.shape)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _arrived(held):
    """Let what comes before this not wait for weights, and have them in registers."""
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [held], dtype=held.dtype, is_pure=False, pack=2
    )


@triton.jit
def _store(total, out, m, n, rows, outputs, out_stride):
    at = out + m.to(tl.int64)[:, None] * out_stride + n
    tl.store(at, total.to(out.dtype.element_ty), mask=(m < rows)[:, None] & (n < outputs))
