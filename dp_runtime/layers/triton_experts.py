"""The MoE stage's kernels in Triton: routing, gate-up with SiLU, down, and the weighted sum.

No count is read back to the host: a graph can capture them, and its replays follow the counts on
the device. Padded rows enter neither routing nor a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.layers.expert_tiles import ExpertTiles, Tile


@dataclass(frozen=True, eq=False)
class Routing:
    """Which pairs (a row and one of its experts) go to this rank's experts, and their weights."""

    weights: Tensor  # [rows, k] float32, 0 where the expert is not local or the row is padding
    local_ids: Tensor  # [rows, k] int32, -1 where the expert is not local or the row is padding
    counts: Tensor  # [local] int32: pairs of each local expert
    pairs: Tensor  # [local, rows] int32: their numbers row * k + j, in no order


def route(
    logits: Tensor,
    layout: Tensor,
    top_k: int,
    renormalize: bool,
    first_expert: int,
    num_local: int,
) -> Routing:
    """Softmax in float32 over all experts, then the top k, sorted by local expert.

    logits [rows, experts]; layout [2, dp_size] int32: where each rank's rows begin among the
    gathered ones, and how many of them are real.
    """
    rows, num_experts = logits.shape
    device = logits.device
    routing = Routing(
        weights=torch.empty(rows, top_k, dtype=torch.float32, device=device),
        local_ids=torch.empty(rows, top_k, dtype=torch.int32, device=device),
        counts=torch.zeros(num_local, dtype=torch.int32, device=device),
        pairs=torch.empty(num_local, rows, dtype=torch.int32, device=device),
    )
    _route_kernel[(rows,)](
        logits, layout, routing.weights, routing.local_ids, routing.counts, routing.pairs,
        logits.stride(0), rows, layout.shape[1], first_expert, num_local,
        NUM_EXPERTS=num_experts, EXPERTS=triton.next_power_of_2(num_experts), TOP_K=top_k,
        K=triton.next_power_of_2(top_k), RANKS=triton.next_power_of_2(layout.shape[1]),
        RENORMALIZE=renormalize, num_warps=1,
    )  # fmt: skip
    return routing


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

    Shapes as for `run_experts` -> [n * k, hidden]; what is not a local pair is not written.
    """
    top_k = routing.local_ids.shape[1]
    num_local, hidden, intermediate = down.shape
    pairs = rows.shape[0] * top_k
    weighted = torch.empty(pairs, hidden, dtype=rows.dtype, device=rows.device)
    if num_local == 0:
        return weighted
    activated = torch.empty(pairs, intermediate, dtype=rows.dtype, device=rows.device)
    common = (routing.counts, routing.pairs, rows.shape[0])
    tile = tiles.gate_up
    _gate_up_kernel[_grid(num_local, intermediate, tile)](
        rows, gate_up, activated, *common, rows.stride(0), intermediate,
        HIDDEN=hidden, TOP_K=top_k, **_options(tile),
    )  # fmt: skip
    tile = tiles.down
    _down_kernel[_grid(num_local, hidden, tile)](
        activated, down, routing.weights, weighted, *common, hidden,
        INTERMEDIATE=intermediate, **_options(tile),
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
    block = 1024
    _sum_kernel[(rows, triton.cdiv(hidden, block))](
        weighted, local_ids, out, hidden, TOP_K=top_k, BLOCK=block, num_warps=4
    )
    return out


def _grid(num_local: int, columns: int, tile: Tile) -> tuple[int, int, int]:
    return triton.cdiv(columns, tile.block_n), num_local, tile.split_m


def _options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@triton.jit(do_not_specialize=["rows"])
def _route_kernel(
    logits, layout, weights, local_ids, counts, pairs,
    logits_stride, rows, dp_size, first_expert, num_local,
    NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr,
    RANKS: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ranks = tl.arange(0, RANKS)
    start = tl.load(layout + ranks, mask=ranks < dp_size, other=0)
    real = tl.load(layout + dp_size + ranks, mask=ranks < dp_size, other=0)
    is_real = tl.sum(((row >= start) & (row < start + real)).to(tl.int32), 0) > 0

    expert = tl.arange(0, EXPERTS)
    inside = tl.where(is_real, expert, NUM_EXPERTS) < NUM_EXPERTS
    score = tl.load(logits + row * logits_stride + expert, mask=inside, other=0.0).to(tl.float32)
    score = tl.where(expert < NUM_EXPERTS, score, float("-inf"))
    score = tl.exp(score - tl.max(score, 0))
    score = score / tl.sum(score, 0)
    score = tl.where(score == score, score, 0.0)  # a NaN row still chooses each expert once

    choice = tl.arange(0, K)
    chosen = tl.full((K,), 0, tl.int32)
    weight = tl.full((K,), 0.0, tl.float32)
    left = tl.where(expert < NUM_EXPERTS, score, -1.0)
    for j in tl.static_range(TOP_K):
        best, at = tl.max(left, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(choice == j, at, chosen)
        weight = tl.where(choice == j, best, weight)
        left = tl.where(expert == at, -1.0, left)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, 0)

    local = chosen - first_expert
    local = tl.where(is_real, local, -1)
    ours = (choice < TOP_K) & (local >= 0) & (local < num_local)
    at = row * TOP_K + choice
    tl.store(weights + at, tl.where(ours, weight, 0.0), mask=choice < TOP_K)
    tl.store(local_ids + at, tl.where(ours, local, -1), mask=choice < TOP_K)
    place = tl.atomic_add(counts + local, 1, mask=ours, sem="relaxed")
    tl.store(pairs + local * rows + place, at, mask=ours & (place < rows))


@triton.jit(do_not_specialize=["rows"])
def _gate_up_kernel(
    x, gate_up, activated, counts, pairs, rows, x_stride, intermediate,
    HIDDEN: tl.constexpr, TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + expert)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < intermediate
    gate_at = gate_up + (expert * 2 * intermediate + tl.where(inside, n, 0))[:, None] * HIDDEN + k
    up_at = gate_at + intermediate.to(tl.int64) * HIDDEN
    m = tl.program_id(2) * BLOCK_M
    while m < count:
        slot = m + tl.arange(0, BLOCK_M)
        pair = tl.load(pairs + expert * rows + slot, mask=slot < count, other=0)
        x_at = x + (pair // TOP_K).to(tl.int64)[:, None] * x_stride + k
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, HIDDEN, BLOCK_K):
            if HIDDEN % BLOCK_K == 0:
                a = tl.load(x_at + start)
                g = tl.load(gate_at + start)
                u = tl.load(up_at + start)
            else:
                some = (start + k < HIDDEN)[None, :]
                a = tl.load(x_at + start, mask=some, other=0.0)
                g = tl.load(gate_at + start, mask=some, other=0.0)
                u = tl.load(up_at + start, mask=some, other=0.0)
            gate = tl.dot(a, g.T, gate, input_precision="ieee")
            up = tl.dot(a, u.T, up, input_precision="ieee")
        # The halves are rounded first, as a product of its own would round them.
        dtype = activated.dtype.element_ty
        gate = gate.to(dtype).to(tl.float32)
        silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
        value = silu * up.to(dtype).to(tl.float32)
        at = activated + pair.to(tl.int64)[:, None] * intermediate + n
        tl.store(at, value.to(dtype), mask=(slot < count)[:, None] & inside)
        m += tl.num_programs(2) * BLOCK_M


@triton.jit(do_not_specialize=["rows"])
def _down_kernel(
    activated, down, weights, weighted, counts, pairs, rows, hidden,
    INTERMEDIATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    count = tl.load(counts + expert)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = n < hidden
    down_at = down + (expert * hidden + tl.where(inside, n, 0))[:, None] * INTERMEDIATE + k
    m = tl.program_id(2) * BLOCK_M
    while m < count:
        slot = m + tl.arange(0, BLOCK_M)
        pair = tl.load(pairs + expert * rows + slot, mask=slot < count, other=0).to(tl.int64)
        a_at = activated + pair[:, None] * INTERMEDIATE + k
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, INTERMEDIATE, BLOCK_K):
            if INTERMEDIATE % BLOCK_K == 0:
                a = tl.load(a_at + start)
                b = tl.load(down_at + start)
            else:
                some = (start + k < INTERMEDIATE)[None, :]
                a = tl.load(a_at + start, mask=some, other=0.0)
                b = tl.load(down_at + start, mask=some, other=0.0)
            total = tl.dot(a, b.T, total, input_precision="ieee")
        weight = tl.load(weights + pair, mask=slot < count, other=0.0)
        at = weighted + pair[:, None] * hidden + n
        value = total.to(weighted.dtype.element_ty).to(tl.float32) * weight[:, None]
        ok = (slot < count)[:, None] & inside
        tl.store(at, value.to(weighted.dtype.element_ty), mask=ok)
        m += tl.num_programs(2) * BLOCK_M


@triton.jit
def _sum_kernel(
    weighted, local_ids, out, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        pair = row * TOP_K + j
        columns = tl.where(tl.load(local_ids + pair) >= 0, hidden, 0)
        total += tl.load(weighted + pair * hidden + n, mask=n < columns, other=0.0)
    tl.store(out + row * hidden + n, total.to(out.dtype.element_ty), mask=n < hidden)
