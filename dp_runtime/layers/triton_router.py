"""Routing in one Triton kernel: the router's product, softmax, top k, and each expert's pairs.

The product of few rows is split over programs, of which the last to arrive for a block of rows
goes on with it. Padded rows enter neither product nor choice; no count is read back to the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.layers.triton_launch import gdc_launch_dependents, gdc_wait, overlaps

MOST_SPLIT_BLOCKS = tl.constexpr(64)  # blocks of rows whose product may be split


@dataclass(frozen=True, eq=False)
class Routing:
    """Which pairs (a row and one of its experts) go to this rank's experts, and their weights."""

    weights: Tensor  # [rows, k] float32, 0 where the expert is not local or the row is padding
    local_ids: Tensor  # [rows, k] int32, -1 where the expert is not local or the row is padding
    counts: Tensor  # [local] int32: pairs of each local expert
    pairs: Tensor  # [local, rows] int32: their numbers row * k + j, in no order


@dataclass(frozen=True, eq=False)
class RoutingCounters:
    """What `route` counts in; all zero between calls, which it restores itself.

    Calls that share one must follow each other on the device.
    """

    values: Tensor  # int32: row blocks done, arrivals of each split block, pairs of each expert

    @classmethod
    def zeros(cls, num_local: int, device: torch.device) -> RoutingCounters:
        size = 1 + MOST_SPLIT_BLOCKS.value + num_local
        return cls(torch.zeros(size, dtype=torch.int32, device=device))


@dataclass(frozen=True)
class RouteTile:
    """block_m rows to a program, the product over hidden split among `splits` of them."""

    block_m: int
    splits: int

    @classmethod
    def of(cls, rows: int) -> RouteTile:
        if rows <= 256:
            return cls(16, 8)
        if rows <= 1024:
            return cls(16, 2)
        return cls(32, 1) if rows <= 4096 else cls(64, 1)

    def partial_shape(self, rows: int, num_experts: int) -> tuple[int, int]:
        """Of the float32 parts of a split product; experts are rounded up to a power of two."""
        blocks = triton.cdiv(rows, self.block_m) if self.splits > 1 else 0
        return blocks * self.splits * self.block_m, max(16, triton.next_power_of_2(num_experts))

    def partial_bytes(self, rows: int, num_experts: int) -> int:
        parts, experts = self.partial_shape(rows, num_experts)
        return parts * experts * 4


def route(
    rows: Tensor,
    router: Tensor,
    layout: Tensor,
    top_k: int,
    renormalize: bool,
    first_expert: int,
    num_local: int,
    counters: RoutingCounters,
    tile: RouteTile,
) -> Routing:
    """Softmax in float32 over all experts of rows @ router.T, then the top k, by local expert.

    rows [n, hidden]; router [experts, hidden]; layout [2, dp_size] int32: where each rank's rows
    begin among the gathered ones, and how many of them are real. Logits are rounded to the dtype of
    rows. Ranks with equal rows and tiles choose alike, to the bit.
    """
    n, hidden = rows.shape
    num_experts, device = router.shape[0], rows.device
    blocks = triton.cdiv(n, tile.block_m)
    assert tile.splits == 1 or blocks <= MOST_SPLIT_BLOCKS.value, f"{n} rows in {tile}"
    routing = Routing(
        weights=torch.empty(n, top_k, dtype=torch.float32, device=device),
        local_ids=torch.empty(n, top_k, dtype=torch.int32, device=device),
        counts=torch.empty(num_local, dtype=torch.int32, device=device),
        pairs=torch.empty(num_local, n, dtype=torch.int32, device=device),
    )
    parts, experts = tile.partial_shape(n, num_experts)
    partial = torch.empty(parts, experts, dtype=torch.float32, device=device)
    pdl = overlaps(device)
    _route_kernel[(blocks, tile.splits)](
        rows, router, layout, partial, counters.values,
        routing.weights, routing.local_ids, routing.counts, routing.pairs,
        rows.stride(0), n, layout.shape[1], first_expert, num_local,
        HIDDEN=hidden, NUM_EXPERTS=num_experts, EXPERTS=experts, TOP_K=top_k,
        K=triton.next_power_of_2(top_k), RANKS=triton.next_power_of_2(layout.shape[1]),
        LOCAL=triton.next_power_of_2(max(1, num_local)), RENORMALIZE=renormalize,
        BLOCK_M=tile.block_m, BLOCK_K=min(128, max(16, 16384 // experts)), SPLITS=tile.splits,
        PDL=pdl, num_warps=4 if experts <= 128 else 8, num_stages=3, launch_pdl=pdl,
    )  # fmt: skip
    return routing


@triton.jit(
    do_not_specialize=["rows", "dp_size", "first_expert"],
    do_not_specialize_on_alignment=["layout"],
)
def _route_kernel(
    x, router, layout, partial, counters, weights, local_ids, counts, pairs,
    x_stride, rows, dp_size, first_expert, num_local,
    HIDDEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    K: tl.constexpr, RANKS: tl.constexpr, LOCAL: tl.constexpr, RENORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    block = tl.program_id(0)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = _is_real(row, layout, dp_size, RANKS)
    logits = _logits(
        x, router, row, real, x_stride, HIDDEN, NUM_EXPERTS, EXPERTS, BLOCK_M, BLOCK_K, SPLITS
    )
    last = True
    if SPLITS > 1:
        at = block * SPLITS * BLOCK_M + tl.arange(0, BLOCK_M)
        at = partial + at[:, None] * EXPERTS + tl.arange(0, EXPERTS)
        tl.store(at + tl.program_id(1) * BLOCK_M * EXPERTS, logits)
        last = _arrive(counters + 1 + block, SPLITS)
        if last:
            logits = tl.zeros((BLOCK_M, EXPERTS), tl.float32)
            for split in tl.static_range(SPLITS):
                logits += tl.load(at + split * BLOCK_M * EXPERTS, cache_modifier=".cg")
    if last:
        logits = logits.to(x.dtype.element_ty).to(tl.float32)
        chosen, weight = _top_k(logits, NUM_EXPERTS, EXPERTS, TOP_K, K, RENORMALIZE, BLOCK_M)
        choice = tl.arange(0, K)[None, :]
        local = chosen - first_expert
        ours = real[:, None] & (choice < TOP_K) & (local >= 0) & (local < num_local)
        pair = row[:, None] * TOP_K + choice
        inside = (row < rows)[:, None] & (choice < TOP_K)
        tl.store(weights + pair, tl.where(ours, weight, 0.0), mask=inside)
        tl.store(local_ids + pair, tl.where(ours, local, -1), mask=inside)
        running = counters + 1 + MOST_SPLIT_BLOCKS
        place = tl.atomic_add(running + local, 1, mask=ours, sem="relaxed")
        tl.store(pairs + local.to(tl.int64) * rows + place, pair, mask=ours & (place < rows))
        if _arrive(counters, tl.num_programs(0)):
            expert = tl.arange(0, LOCAL)
            total = tl.load(running + expert, mask=expert < num_local, cache_modifier=".cg")
            tl.store(counts + expert, total, mask=expert < num_local)
            tl.debug_barrier()
            tl.store(running + expert, 0, mask=expert < num_local)


@triton.jit
def _arrive(counter, expected):
    """Whether this program is the last of those expected; it sees what the others wrote."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel") == expected - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def _is_real(row, layout, dp_size, RANKS: tl.constexpr):
    rank = tl.arange(0, RANKS)
    start = tl.load(layout + rank, mask=rank < dp_size, other=0)[None, :]
    real = tl.load(layout + dp_size + rank, mask=rank < dp_size, other=0)[None, :]
    inside = (row[:, None] >= start) & (row[:, None] < start + real)
    return tl.sum(inside.to(tl.int32), 1) > 0


@triton.jit
def _logits(
    x, router, row, real, x_stride,
    HIDDEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """This program's part of the sum over hidden, [BLOCK_M, EXPERTS] float32."""
    steps: tl.constexpr = (HIDDEN + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K)
    expert = tl.arange(0, EXPERTS)
    some = (expert < NUM_EXPERTS)[:, None]
    k = tl.program_id(1) * steps * BLOCK_K + tl.arange(0, BLOCK_K)
    x_at = x + row.to(tl.int64)[:, None] * x_stride
    router_at = router + expert[:, None] * HIDDEN
    total = tl.zeros((BLOCK_M, EXPERTS), tl.float32)
    for _ in range(steps):
        within = (k < HIDDEN)[None, :]
        a = tl.load(x_at + k, mask=real[:, None] & within, other=0.0)
        b = tl.load(router_at + k, mask=some & within, other=0.0)
        total = tl.dot(a, b.T, total, input_precision="ieee")
        k += BLOCK_K
    return total


@triton.jit
def _top_k(
    score, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    K: tl.constexpr, RENORMALIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Each row's best experts and their probabilities, both [BLOCK_M, K]."""
    expert = tl.arange(0, EXPERTS)[None, :]
    score = tl.where(expert < NUM_EXPERTS, score, float("-inf"))
    score = tl.exp(score - tl.max(score, 1)[:, None])
    score = score / tl.sum(score, 1)[:, None]
    score = tl.where(score == score, score, 0.0)  # a NaN row still chooses each expert once
    choice = tl.arange(0, K)[None, :]
    chosen = tl.zeros((BLOCK_M, K), tl.int32)
    weight = tl.zeros((BLOCK_M, K), tl.float32)
    left = tl.where(expert < NUM_EXPERTS, score, -1.0)
    for j in tl.static_range(TOP_K):
        best, at = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(choice == j, at[:, None], chosen)
        weight = tl.where(choice == j, best[:, None], weight)
        left = tl.where(expert == at[:, None], -1.0, left)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, 1)[:, None]
    return chosen, weight
