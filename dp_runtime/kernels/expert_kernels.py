"""The experts' products in Triton: gate-up with SiLU, down with weights, and the sum of pairs.

With few rows an expert, each expert and block of columns has its own program; else programs take
turns at tiles that the device counts. No count is read back to the host: a graph can capture the
kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.kernels.expert_products import (
    SCALE_BLOCK,
    add_product,
    operand,
    powers_near,
    scales_of,
    zeros,
)
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["rows"])
def gate_up_kernel(
    x, gate_up, gate_up_blocks, scales, activated, peaks, counts, pairs, rows, num_local,
    x_stride, intermediate,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_EXPERT: tl.constexpr, REST: tl.constexpr, SWAP: tl.constexpr, REGROUP: tl.constexpr,
    F16: tl.constexpr, JOINT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.cdiv(intermediate, BLOCK_N)
    if BY_EXPERT:
        expert, column = tl.program_id(0) // columns, tl.program_id(0) % columns
        count = tl.load(counts + expert)
        first = 0
        while first < count:
            _gate_up_tile(
                x, gate_up, gate_up_blocks, scales, activated, peaks, pairs, rows,
                expert, column, first, count, None, x_stride, intermediate,
                HIDDEN, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, REGROUP, F16, JOINT,
            )  # fmt: skip
            first += BLOCK_M
    else:
        all_counts, ends = _row_blocks(counts, num_local, LOCAL, BLOCK_M)
        tile, num_tiles = tl.program_id(0), tl.max(ends, 0) * columns
        while tile < num_tiles:
            expert, begin, first, count = _place(tile // columns, all_counts, ends, LOCAL, BLOCK_M)
            if count - first > REST:
                _gate_up_tile(
                    x, gate_up, gate_up_blocks, scales, activated, peaks, pairs, rows,
                    expert, tile % columns, first, count, begin, x_stride, intermediate,
                    HIDDEN, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, REGROUP, F16, JOINT,
                )  # fmt: skip
            elif REST > 0:
                _gate_up_tile(
                    x, gate_up, gate_up_blocks, scales, activated, peaks, pairs, rows,
                    expert, tile % columns, first, count, begin, x_stride, intermediate,
                    HIDDEN, TOP_K, REST, BLOCK_N, BLOCK_K, SWAP, REGROUP, F16, JOINT,
                )  # fmt: skip
            tile += tl.num_programs(0)


@triton.jit
def _gate_up_tile(
    x, gate_up, gate_up_blocks, scales, activated, peaks, pairs, rows,
    expert, column, first, count, begin, x_stride, intermediate,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, REGROUP: tl.constexpr, F16: tl.constexpr, JOINT: tl.constexpr,
):  # fmt: skip
    """Compute a block of one expert's pairs and of columns: by pair, or from row `begin` on."""
    index = first + tl.arange(0, BLOCK_M)
    ours = index < count
    pair = tl.load(pairs + expert.to(tl.int64) * rows + index, mask=ours, other=0)
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_row = expert * 2 * intermediate + column * BLOCK_N
    x_at = x + (pair // TOP_K).to(tl.int64)[:, None] * x_stride
    inside = tl.where(n < intermediate, n, 0)
    gate_at = gate_up + (expert.to(tl.int64) * 2 * intermediate + inside)[:, None] * HIDDEN
    up_at = gate_at + intermediate.to(tl.int64) * HIDDEN
    of_gate = scales_of(expert * 2, column * BLOCK_N, intermediate, HIDDEN)
    of_up = scales_of(expert * 2 + 1, column * BLOCK_N, intermediate, HIDDEN)
    if JOINT:
        both_at = gate_up_blocks, expert * 2, column * BLOCK_N
        gate, up = _joint(x_at, both_at, HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K, SWAP)
    else:
        gate = zeros(BLOCK_M, BLOCK_N, SWAP)
        up = zeros(BLOCK_M, BLOCK_N, SWAP)
        factor = 0.125 if F16 else None
        for start in range(0, HIDDEN, BLOCK_K):
            a = operand(_block(x_at, start + k, HIDDEN, BLOCK_K), factor, REGROUP)
            if gate_up_blocks is not None:
                g = gate_up_blocks.load([gate_row, start])
                u = gate_up_blocks.load([gate_row + intermediate, start])
            else:
                g = _block(gate_at, start + k, HIDDEN, BLOCK_K)
                u = _block(up_at, start + k, HIDDEN, BLOCK_K)
            at = start // SCALE_BLOCK
            gate = add_product(a, g, gate, scales, of_gate + at, SWAP, REGROUP)
            up = add_product(a, u, up, scales, of_up + at, SWAP, REGROUP)
        if SWAP:
            gate, up = gate.T, up.T
        if F16:
            gate, up = gate * 8.0, up * 8.0
    value = _activate(gate, up, activated.dtype.element_ty)
    target = (pair if begin is None else begin + index).to(tl.int64)
    inside = ours[:, None] & (n < intermediate)
    tl.store(activated + target[:, None] * intermediate + n, value, mask=inside)
    if peaks is not None:
        peak = tl.max(tl.abs(value.to(tl.float32)), 1)  # of a whole block
        tl.store(peaks + target * tl.cdiv(intermediate, BLOCK_N) + column, peak, mask=ours)


@triton.jit
def _activate(gate, up, DTYPE: tl.constexpr):
    """Compute silu(gate) * up; both are rounded first, as separate products would round them."""
    gate = gate.to(DTYPE).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
    return (silu * up.to(DTYPE).to(tl.float32)).to(DTYPE)


@triton.jit
def _joint(
    x_at, both_at,
    HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """Compute gate and up as one product, over a block [2, BLOCK_N, BLOCK_K] of both at a time."""
    blocks, matrix, row = both_at
    both = zeros(BLOCK_M, 2 * BLOCK_N, SWAP)
    for start in range(0, HIDDEN, BLOCK_K):
        a = _block(x_at, start + tl.arange(0, BLOCK_K), HIDDEN, BLOCK_K)
        weights = blocks.load([matrix, row, start]).reshape(2 * BLOCK_N, BLOCK_K)
        both = add_product(a, weights, both, None, 0, SWAP, False)
    if SWAP:
        both = both.T
    return both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()


@triton.jit(do_not_specialize=["rows"])
def down_kernel(
    activated, activated_blocks, peaks, down, down_blocks, scales, weights, weighted,
    counts, pairs, rows, num_local, hidden,
    INTERMEDIATE: tl.constexpr, PEAKS: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_EXPERT: tl.constexpr, REST: tl.constexpr, SWAP: tl.constexpr, REGROUP: tl.constexpr,
    F16: tl.constexpr, JOINT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.cdiv(hidden, BLOCK_N)
    if BY_EXPERT:
        expert, column = tl.program_id(0) // columns, tl.program_id(0) % columns
        count = tl.load(counts + expert)
        first = 0
        while first < count:
            _down_tile(
                activated, None, peaks, down, down_blocks, scales, weights, weighted, pairs, rows,
                expert, column, first, count, None, hidden,
                INTERMEDIATE, PEAKS, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, REGROUP, F16,
            )  # fmt: skip
            first += BLOCK_M
    else:
        all_counts, ends = _row_blocks(counts, num_local, LOCAL, BLOCK_M)
        tile, num_tiles = tl.program_id(0), tl.max(ends, 0) * columns
        while tile < num_tiles:
            expert, begin, first, count = _place(tile // columns, all_counts, ends, LOCAL, BLOCK_M)
            if count - first > REST:
                _down_tile(
                    activated, activated_blocks, peaks, down, down_blocks, scales, weights,
                    weighted, pairs, rows, expert, tile % columns, first, count, begin, hidden,
                    INTERMEDIATE, PEAKS, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, REGROUP, F16,
                )  # fmt: skip
            elif REST > 0:  # the copy engine reads blocks of BLOCK_M rows
                _down_tile(
                    activated, None, peaks, down, down_blocks, scales, weights, weighted,
                    pairs, rows, expert, tile % columns, first, count, begin, hidden,
                    INTERMEDIATE, PEAKS, REST, BLOCK_N, BLOCK_K, SWAP, REGROUP, F16,
                )  # fmt: skip
            tile += tl.num_programs(0)


@triton.jit
def _down_tile(
    activated, activated_blocks, peaks, down, down_blocks, scales, weights, weighted, pairs, rows,
    expert, column, first, count, begin, hidden,
    INTERMEDIATE: tl.constexpr, PEAKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr, REGROUP: tl.constexpr, F16: tl.constexpr,
):  # fmt: skip
    """Compute a block of columns of pairs' rows of activated, as `_gate_up_tile` wrote them."""
    index = first + tl.arange(0, BLOCK_M)
    ours = index < count
    pair = tl.load(pairs + expert.to(tl.int64) * rows + index, mask=ours, other=0)
    source = pair if begin is None else begin + index
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    down_row = expert * hidden + column * BLOCK_N
    a_at = activated + tl.where(ours, source, 0).to(tl.int64)[:, None] * INTERMEDIATE
    inside = tl.where(n < hidden, n, 0)
    down_at = down + (expert.to(tl.int64) * hidden + inside)[:, None] * INTERMEDIATE
    weight = tl.load(weights + pair, mask=ours, other=0.0)
    scale = scales_of(expert, column * BLOCK_N, hidden, INTERMEDIATE)
    power = None
    if F16:
        power, inverse = _powers(peaks, source, ours, PEAKS)
        weight *= inverse  # of sums that have the power still: rounding is the same
    total = zeros(BLOCK_M, BLOCK_N, SWAP)
    for start in range(0, INTERMEDIATE, BLOCK_K):
        if activated_blocks is not None:
            a = activated_blocks.load([begin + first, start])
        else:
            a = _block(a_at, start + k, INTERMEDIATE, BLOCK_K)
        a = operand(a, power, REGROUP)
        if down_blocks is not None:
            b = down_blocks.load([down_row, start])
        else:
            b = _block(down_at, start + k, INTERMEDIATE, BLOCK_K)
        at = scale + start // SCALE_BLOCK
        total = add_product(a, b, total, scales, at, SWAP, REGROUP)
    if SWAP:
        total = total.T
    value = total.to(weighted.dtype.element_ty).to(tl.float32) * weight[:, None]
    at = weighted + pair.to(tl.int64)[:, None] * hidden + n
    tl.store(at, value.to(weighted.dtype.element_ty), mask=ours[:, None] & (n < hidden))


@triton.jit
def _powers(peaks, source, ours, PEAKS: tl.constexpr):
    """Find powers of two by which rows fit f16, as a column, and their inverses."""
    block = tl.arange(0, triton.next_power_of_2(PEAKS))
    at = peaks + source.to(tl.int64)[:, None] * PEAKS + block
    peak = tl.max(tl.load(at, mask=ours[:, None] & (block < PEAKS), other=0.0), 1)
    power, inverse = powers_near(peak)
    return power[:, None], inverse


@triton.jit
def _row_blocks(counts, num_local, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Count each expert's pairs, and the blocks of BLOCK_M pairs up to each expert's end."""
    expert = tl.arange(0, LOCAL)
    count = tl.load(counts + expert, mask=expert < num_local, other=0)
    return count, tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def _place(block, counts, ends, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Find a block's expert, where it begins in expert order, the block's first pair, the count."""
    before = ends <= block
    expert = tl.sum(before.to(tl.int32), 0)
    begin = tl.sum(tl.where(before, counts, 0), 0)
    first = (block - tl.max(tl.where(before, ends, 0), 0)) * BLOCK_M
    count = tl.sum(tl.where(tl.arange(0, LOCAL) == expert, counts, 0), 0)
    return expert, begin, first, count


@triton.jit
def _block(rows_at, k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    if WIDTH % BLOCK_K == 0:
        return tl.load(rows_at + k)
    return tl.load(rows_at + k, mask=(k < WIDTH)[None, :], other=0.0)


@triton.jit
def sum_kernel(
    weighted, local_ids, out, hidden,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = row * TOP_K + j
        columns = tl.where(tl.load(local_ids + pair) >= 0, hidden, 0)
        total += tl.load(weighted + pair * hidden + n, mask=n < columns, other=0.0)
    tl.store(out + row * hidden + n, total.to(out.dtype.element_ty), mask=n < hidden)
