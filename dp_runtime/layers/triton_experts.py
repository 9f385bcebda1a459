"""The experts' products in Triton: gate-up with SiLU, down with weights, and the sum of pairs.

Where experts have few rows there is a program for each expert and block of columns. Else the tiles
of a product are counted on the device, from the pairs that each expert has, and a program takes
every so-manyth. No count is read back to the host: a graph can capture the kernels, and its replays
follow the counts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dp_runtime.layers.expert_tiles import ExpertTiles, Tile
from dp_runtime.layers.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    num_multiprocessors,
    overlaps,
)
from dp_runtime.layers.triton_router import Routing


def run_experts(
    rows: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, tiles: ExpertTiles
) -> Tensor:
    """Sum over a row's chosen local experts of weight * down(silu(gate(row)) * up(row)).

    rows [n, hidden]; gate_up [local, 2 * intermediate, hidden]; down [local, hidden,
    intermediate] -> [n, hidden]; a row without local experts is 0.
    """
    return sum_pairs(run_pairs(rows, gate_up, down, routing, tiles), routing.local_ids)


def run_pairs(
    rows: Tensor, gate_up: Tensor, down: Tensor, routing: Routing, tiles: ExpertTiles
) -> Tensor:
    """weight * down(silu(gate(row)) * up(row)) of every local pair, in the dtype of rows.

    Shapes as for `run_experts`, weights contiguous -> [n * k, hidden]; what is not a local pair is
    not written.
    """
    num_local, hidden, _ = down.shape
    if num_local == 0:
        return rows.new_empty(routing.local_ids.numel(), hidden)
    assert tiles.gate_up.by_expert == tiles.down.by_expert, f"one order of pairs: {tiles}"
    activated = gate_up_pairs(rows, gate_up, routing, tiles.gate_up)
    return down_pairs(activated, down, routing, tiles.down)


def gate_up_pairs(rows: Tensor, gate_up: Tensor, routing: Routing, tile: Tile) -> Tensor:
    """silu(gate(row)) * up(row) of every local pair, [n * k, intermediate].

    Shapes as for `run_experts`. A tile by expert writes each at its pair, any other one behind the
    other in the order of the experts.
    """
    num_local, both, hidden = gate_up.shape
    n, top_k = routing.local_ids.shape
    intermediate, pairs = both // 2, n * top_k
    activated = rows.new_empty(pairs, intermediate)
    pdl = overlaps(rows.device)
    _gate_up_kernel[_grid(rows, num_local, pairs, intermediate, tile)](
        rows, gate_up, _by_tma(gate_up, num_local * both, hidden, tile.block_n, tile), activated,
        routing.counts, routing.pairs, n, num_local, rows.stride(0), intermediate,
        HIDDEN=hidden, TOP_K=top_k, LOCAL=triton.next_power_of_2(num_local),
        PDL=pdl, launch_pdl=pdl, **_options(tile),
    )  # fmt: skip
    return activated


def down_pairs(activated: Tensor, down: Tensor, routing: Routing, tile: Tile) -> Tensor:
    """weight * down(row) of what `gate_up_pairs` gives, each at its pair: [n * k, hidden]."""
    num_local, hidden, intermediate = down.shape
    pairs = len(activated)
    weighted = activated.new_empty(pairs, hidden)
    pdl = overlaps(down.device)
    _down_kernel[_grid(activated, num_local, pairs, hidden, tile)](
        activated,
        None if tile.by_expert else _by_tma(activated, pairs, intermediate, tile.block_m, tile),
        down, _by_tma(down, num_local * hidden, intermediate, tile.block_n, tile),
        routing.weights, weighted, routing.counts, routing.pairs, len(routing.local_ids),
        num_local, hidden, INTERMEDIATE=intermediate,
        LOCAL=triton.next_power_of_2(num_local), PDL=pdl, launch_pdl=pdl, **_options(tile),
    )  # fmt: skip
    return weighted


def sum_pairs(weighted: Tensor, local_ids: Tensor) -> Tensor:
    """The sum of each row's local pairs, in float32 in the order of its experts.

    weighted [n * k, hidden]; local_ids [n, k] int32, -1 where a pair is not local and its part of
    weighted is not read -> [n, hidden].
    """
    rows, top_k = local_ids.shape
    hidden = weighted.shape[1]
    out = weighted.new_empty(rows, hidden)
    block, pdl = 1024, overlaps(weighted.device)
    _sum_kernel[(rows, triton.cdiv(hidden, block))](
        weighted, local_ids, out, hidden,
        TOP_K=top_k, BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _grid(rows: Tensor, num_local: int, pairs: int, columns: int, tile: Tile) -> tuple[int]:
    """As many programs as there can be tiles, at most `per_multiprocessor` of them."""
    if tile.per_multiprocessor is None:
        return (num_local * triton.cdiv(columns, tile.block_n),)
    row_blocks = min(pairs, num_local + pairs // tile.block_m)
    most = num_multiprocessors(rows.device) * tile.per_multiprocessor
    return (min(row_blocks * triton.cdiv(columns, tile.block_n), most),)


def _by_tma(
    matrix: Tensor, rows: int, columns: int, block: int, tile: Tile
) -> TensorDescriptor | None:
    """How the copy engine reads blocks of `block` rows of a contiguous matrix."""
    if not tile.tma:
        return None
    return TensorDescriptor(matrix, [rows, columns], [columns, 1], [block, tile.block_k])


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BY_EXPERT": tile.by_expert,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit(do_not_specialize=["rows"])
def _gate_up_kernel(
    x, gate_up, gate_up_blocks, activated, counts, pairs, rows, num_local, x_stride, intermediate,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_EXPERT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.cdiv(intermediate, BLOCK_N)
    if BY_EXPERT:
        expert, column = tl.program_id(0) // columns, tl.program_id(0) % columns
        count = tl.load(counts + expert)
        slot = tl.arange(0, BLOCK_M)
        while tl.min(slot, 0) < count:
            pair = tl.load(pairs + expert.to(tl.int64) * rows + slot, mask=slot < count, other=0)
            _gate_up_tile(
                x, gate_up, gate_up_blocks, activated, expert, column, pair, pair, slot < count,
                x_stride, intermediate, HIDDEN, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            slot += BLOCK_M
    else:
        count, ends = _row_blocks(counts, num_local, LOCAL, BLOCK_M)
        tile, num_tiles = tl.program_id(0), tl.max(ends, 0) * columns
        while tile < num_tiles:
            expert, begin, slot, ours = _place(tile // columns, count, ends, LOCAL, BLOCK_M)
            pair = tl.load(pairs + expert.to(tl.int64) * rows + slot, mask=ours, other=0)
            _gate_up_tile(
                x, gate_up, gate_up_blocks, activated, expert, tile % columns, pair, begin + slot,
                ours, x_stride, intermediate, HIDDEN, TOP_K, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            tile += tl.num_programs(0)


@triton.jit
def _gate_up_tile(
    x, gate_up, gate_up_blocks, activated, expert, column, pair, target, ours,
    x_stride, intermediate,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of one expert's pairs, a block of columns: to rows `target` of activated."""
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    gate_row = expert * 2 * intermediate + column * BLOCK_N
    x_at = x + (pair // TOP_K).to(tl.int64)[:, None] * x_stride
    inside = tl.where(n < intermediate, n, 0)
    gate_at = gate_up + (expert.to(tl.int64) * 2 * intermediate + inside)[:, None] * HIDDEN
    up_at = gate_at + intermediate.to(tl.int64) * HIDDEN
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        a = _block(x_at, start + k, HIDDEN, BLOCK_K)
        if gate_up_blocks is not None:
            g = gate_up_blocks.load([gate_row, start])
            u = gate_up_blocks.load([gate_row + intermediate, start])
        else:
            g = _block(gate_at, start + k, HIDDEN, BLOCK_K)
            u = _block(up_at, start + k, HIDDEN, BLOCK_K)
        gate = tl.dot(a, g.T, gate, input_precision="ieee")
        up = tl.dot(a, u.T, up, input_precision="ieee")
    # The halves are rounded first, as a product of its own would round them.
    dtype = activated.dtype.element_ty
    gate = gate.to(dtype).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    value = silu * up.to(dtype).to(tl.float32)
    at = activated + target.to(tl.int64)[:, None] * intermediate + n
    tl.store(at, value.to(dtype), mask=ours[:, None] & (n < intermediate))


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(
    activated, activated_blocks, down, down_blocks, weights, weighted,
    counts, pairs, rows, num_local, hidden,
    INTERMEDIATE: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BY_EXPERT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    columns = tl.cdiv(hidden, BLOCK_N)
    if BY_EXPERT:
        expert, column = tl.program_id(0) // columns, tl.program_id(0) % columns
        count = tl.load(counts + expert)
        slot = tl.arange(0, BLOCK_M)
        while tl.min(slot, 0) < count:
            pair = tl.load(pairs + expert.to(tl.int64) * rows + slot, mask=slot < count, other=0)
            _down_tile(
                activated, activated_blocks, down, down_blocks, weights, weighted,
                expert, column, pair, pair, slot < count, hidden,
                INTERMEDIATE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            slot += BLOCK_M
    else:
        count, ends = _row_blocks(counts, num_local, LOCAL, BLOCK_M)
        tile, num_tiles = tl.program_id(0), tl.max(ends, 0) * columns
        while tile < num_tiles:
            expert, begin, slot, ours = _place(tile // columns, count, ends, LOCAL, BLOCK_M)
            pair = tl.load(pairs + expert.to(tl.int64) * rows + slot, mask=ours, other=0)
            _down_tile(
                activated, activated_blocks, down, down_blocks, weights, weighted,
                expert, tile % columns, pair, begin + slot, ours, hidden,
                INTERMEDIATE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            tile += tl.num_programs(0)


@triton.jit
def _down_tile(
    activated, activated_blocks, down, down_blocks, weights, weighted,
    expert, column, pair, source, ours, hidden,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows `source` of activated, a block of columns: to rows `pair` of weighted."""
    k = tl.arange(0, BLOCK_K)
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.min(source, 0)
    down_row = expert * hidden + column * BLOCK_N
    a_at = activated + tl.where(ours, source, 0).to(tl.int64)[:, None] * INTERMEDIATE
    inside = tl.where(n < hidden, n, 0)
    down_at = down + (expert.to(tl.int64) * hidden + inside)[:, None] * INTERMEDIATE
    weight = tl.load(weights + pair, mask=ours, other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, INTERMEDIATE, BLOCK_K):
        if activated_blocks is not None:
            a = activated_blocks.load([first, start])
        else:
            a = _block(a_at, start + k, INTERMEDIATE, BLOCK_K)
        if down_blocks is not None:
            b = down_blocks.load([down_row, start])
        else:
            b = _block(down_at, start + k, INTERMEDIATE, BLOCK_K)
        total = tl.dot(a, b.T, total, input_precision="ieee")
    value = total.to(weighted.dtype.element_ty).to(tl.float32) * weight[:, None]
    at = weighted + pair.to(tl.int64)[:, None] * hidden + n
    tl.store(at, value.to(weighted.dtype.element_ty), mask=ours[:, None] & (n < hidden))


@triton.jit
def _row_blocks(counts, num_local, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """Each expert's pairs, and the blocks of BLOCK_M of them up to the end of each expert."""
    expert = tl.arange(0, LOCAL)
    count = tl.load(counts + expert, mask=expert < num_local, other=0)
    return count, tl.cumsum((count + BLOCK_M - 1) // BLOCK_M, 0)


@triton.jit
def _place(block, count, ends, LOCAL: tl.constexpr, BLOCK_M: tl.constexpr):
    """A block of rows: its expert, where that one's pairs begin, its slots, and which are filled.

    Pairs lie in the order of their experts.
    """
    before = ends <= block
    expert = tl.sum(before.to(tl.int32), 0)
    begin = tl.sum(tl.where(before, count, 0), 0)
    slot = (block - tl.max(tl.where(before, ends, 0), 0)) * BLOCK_M + tl.arange(0, BLOCK_M)
    own = tl.sum(tl.where(tl.arange(0, LOCAL) == expert, count, 0), 0)
    return expert, begin, slot, slot < own


@triton.jit
def _block(rows_at, k, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k of the rows that begin at rows_at, 0 past their end."""
    if WIDTH % BLOCK_K == 0:
        return tl.load(rows_at + k)
    return tl.load(rows_at + k, mask=(k < WIDTH)[None, :], other=0.0)


@triton.jit
def _sum_kernel(
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
