"""Routing in Triton, of real rows only, and without reading a count back to the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, overlaps

MAX_SPLIT_ROWS = 512  # few rows are split over programs; of more, cuBLAS makes enough programs
BLOCK_K = BLOCK_N = 128
LOADED = 4096  # logits that a warp asks for at once: half of its registers
MAX_BLOCKS = 16  # of rows and experts; more are enough for cuBLAS, too
MAX_PROGRAMS = 128  # about one for each multiprocessor of an H200


@dataclass(frozen=True)
class RouterTile:
    """How the router's product is cut into programs."""

    block_m: int
    split: int  # columns of hidden that a program sums: a multiple of BLOCK_K

    @property
    def block_k(self) -> int:  # half in a loop, so that two programs fit a multiprocessor
        return BLOCK_K if self.split == BLOCK_K else BLOCK_K // 2


class KeptChoices(Protocol):
    @property
    def ids(self) -> Tensor: ...  # [max_rows, k], of a rank's own rows

    @property
    def position(self) -> int: ...  # of that rank in row_ranges


@dataclass(frozen=True, eq=False)
class Routing:
    """The pairs (a row and one of its experts) of this rank's experts, and their weights."""

    weights: Tensor  # [rows, k] float32, 0 where the expert is not local or the row is padding
    local_ids: Tensor  # [rows, k] int32, -1 where the expert is not local or the row is padding
    counts: Tensor  # [local] int32: pairs of each local expert
    pairs: Tensor  # [local, rows] int32: their numbers row * k + j, in no order


def route(
    rows: Tensor,
    router: Tensor,
    row_ranges: Tensor,
    top_k: int,
    renormalize: bool,
    first_expert: int,
    num_local: int,
    kept: KeptChoices | None = None,
) -> Routing:
    """Softmax rows @ router.T in float32 over all experts and list the top k by local expert.

    rows [n, hidden]; router [experts, hidden]; row_ranges [2, dp_size] int32: each rank's first
    gathered row and its number of real rows. Ranks choose alike for equal rows, to the bit.
    kept: where the choices for one rank's real rows are left, whoever has the experts.
    """
    n, device = len(rows), rows.device
    routing = Routing(
        weights=torch.empty(n, top_k, dtype=torch.float32, device=device),
        local_ids=torch.empty(n, top_k, dtype=torch.int32, device=device),
        counts=torch.empty(num_local, dtype=torch.int32, device=device),
        pairs=torch.empty(num_local, n, dtype=torch.int32, device=device),
    )
    tile = choose_router_tile(n, rows.shape[1], len(router))
    parts = logits_in_parts(rows, router, routing.counts, tile)
    choose_experts(parts, router, row_ranges, renormalize, first_expert, routing, kept)
    return routing


def choose_router_tile(rows: int, hidden: int, num_experts: int) -> RouterTile | None:
    """Choose a cut within 3 % of the best of those that were measured; None: by cuBLAS."""
    block_m = 64 if rows > 64 else 16 if num_experts <= BLOCK_N else 32
    blocks = triton.cdiv(rows, block_m) * triton.cdiv(num_experts, BLOCK_N)
    if rows > MAX_SPLIT_ROWS or blocks > MAX_BLOCKS:
        return None
    split = BLOCK_K if blocks <= 2 else 2 * BLOCK_K  # more parts take longer to add than a loop
    while split < hidden and blocks * triton.cdiv(hidden, split) > MAX_PROGRAMS:
        split *= 2
    return RouterTile(block_m, split)


def parts_shape(
    rows: int, hidden: int, num_experts: int, tile: RouterTile | None
) -> tuple[int, int, int]:
    return (1 if tile is None else triton.cdiv(hidden, tile.split)), rows, num_experts


def logits_in_parts(
    rows: Tensor, router: Tensor, counts: Tensor, tile: RouterTile | None
) -> Tensor:
    """Compute [parts, rows, experts], whose sum is rows @ router.T; also set counts to 0."""
    (n, hidden), num_experts = rows.shape, len(router)
    if tile is None:
        counts.zero_()
        return F.linear(rows, router)[None]
    parts = rows.new_empty(parts_shape(n, hidden, num_experts, tile), dtype=torch.float32)
    block_n = min(BLOCK_N, max(16, triton.next_power_of_2(num_experts)))
    pdl = overlaps(rows.device)
    grid = triton.cdiv(n, tile.block_m), triton.cdiv(num_experts, block_n), len(parts)
    _product_kernel[grid](
        rows, router, parts, counts, rows.stride(0), n, len(counts),
        HIDDEN=hidden, NUM_EXPERTS=num_experts,
        LOCAL=triton.next_power_of_2(max(1, len(counts))),
        BLOCK_M=tile.block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k, SPLIT=tile.split,
        PDL=pdl, num_warps=4, num_stages=3, launch_pdl=pdl,
    )  # fmt: skip
    return parts


def choose_experts(
    parts: Tensor,
    router: Tensor,
    row_ranges: Tensor,
    renormalize: bool,
    first_expert: int,
    routing: Routing,
    kept: KeptChoices | None = None,
    num_warps: int = 1,
) -> None:
    """Fill routing, whose counts are 0, from logits in parts, whose sum is rounded as router is."""
    num_parts, n, num_experts = parts.shape
    top_k, num_local = routing.local_ids.shape[1], len(routing.counts)
    experts = triton.next_power_of_2(num_experts)
    at_once = LOADED * num_warps // experts
    pdl = overlaps(parts.device)
    choices, position = (routing.local_ids, 0) if kept is None else (kept.ids, kept.position)
    _route_kernel[(n,)](
        parts, router, row_ranges, routing.weights, routing.local_ids, routing.counts,
        routing.pairs, choices, n, row_ranges.shape[1], first_expert, num_local,
        choices.stride(0), position, KEEPS=kept is not None,
        PARTS=num_parts, AT_ONCE=min(triton.next_power_of_2(num_parts), max(1, at_once)),
        NUM_EXPERTS=num_experts, EXPERTS=experts, TOP_K=top_k, K=triton.next_power_of_2(top_k),
        RANKS=triton.next_power_of_2(row_ranges.shape[1]), RENORMALIZE=renormalize,
        PDL=pdl, num_warps=num_warps, launch_pdl=pdl,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x, router, parts, counts, x_stride, rows, num_local,
    HIDDEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_expert = (expert < NUM_EXPERTS)[:, None]
    k = tl.program_id(2) * SPLIT + tl.arange(0, BLOCK_K)
    weight_at = router + expert[:, None] * HIDDEN + k
    weight = tl.load(weight_at, mask=is_expert & (k < HIDDEN)[None, :], other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None]
    x_at = x + row.to(tl.int64)[:, None] * x_stride + k
    a = tl.load(x_at, mask=inside & (k < HIDDEN)[None, :], other=0.0)
    logits = _product(a, weight)
    for start in range(BLOCK_K, SPLIT, BLOCK_K):
        within = (k + start < HIDDEN)[None, :]
        a = tl.load(x_at + start, mask=inside & within, other=0.0)
        weight = tl.load(weight_at + start, mask=is_expert & within, other=0.0)
        logits += _product(a, weight)
    at = parts + (tl.program_id(2) * rows + row.to(tl.int64)[:, None]) * NUM_EXPERTS + expert
    tl.store(at, logits, mask=inside & (expert < NUM_EXPERTS))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        local = tl.arange(0, LOCAL)
        tl.store(counts + local, tl.zeros((LOCAL,), tl.int32), mask=local < num_local)


@triton.jit
def _product(a, weight):
    """Compute a @ weight.T; the first operand of SM90's product has 64 rows at least."""
    if a.shape[0] < 64:
        return tl.dot(weight, a.T, input_precision="ieee").T
    return tl.dot(a, weight.T, input_precision="ieee")


@triton.jit(do_not_specialize=["choices", "rows", "first_expert", "choices_stride", "position"])
def _route_kernel(
    parts, router, row_ranges, weights, local_ids, counts, pairs, choices,
    rows, dp_size, first_expert, num_local, choices_stride, position,
    KEEPS: tl.constexpr, PARTS: tl.constexpr, AT_ONCE: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    EXPERTS: tl.constexpr, TOP_K: tl.constexpr, K: tl.constexpr, RANKS: tl.constexpr,
    RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    ranks = tl.arange(0, RANKS)
    start = tl.load(row_ranges + ranks, mask=ranks < dp_size, other=0)
    real = tl.load(row_ranges + dp_size + ranks, mask=ranks < dp_size, other=0)
    is_real = tl.sum(((row >= start) & (row < start + real)).to(tl.int32), 0) > 0
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.arange(0, EXPERTS)
    inside = (expert < tl.where(is_real, NUM_EXPERTS, 0))[None, :]
    score = tl.zeros((EXPERTS,), tl.float32)
    for first in tl.static_range(0, PARTS, AT_ONCE):
        part = (first + tl.arange(0, AT_ONCE))[:, None]
        at = parts + (part * rows.to(tl.int64) + row) * NUM_EXPERTS + expert
        some = tl.load(at, mask=inside & (part < PARTS), other=0.0)
        score += tl.sum(some.to(tl.float32), 0)
    score = score.to(router.dtype.element_ty).to(tl.float32)
    chosen, weight = _top_k(score, NUM_EXPERTS, EXPERTS, TOP_K, K, RENORMALIZE)
    choice = tl.arange(0, K)
    local = chosen - first_expert
    local = tl.where(is_real, local, -1)
    ours = (choice < TOP_K) & (local >= 0) & (local < num_local)
    if KEEPS:
        own = row - tl.load(row_ranges + position)
        is_own = (own >= 0) & (own < tl.load(row_ranges + dp_size + position))
        kept, mine = chosen.to(choices.dtype.element_ty), tl.where(is_own, choice, TOP_K) < TOP_K
        tl.store(choices + own * choices_stride + choice, kept, mask=mine)
    pair = row * TOP_K + choice
    tl.store(weights + pair, tl.where(ours, weight, 0.0), mask=choice < TOP_K)
    tl.store(local_ids + pair, tl.where(ours, local, -1), mask=choice < TOP_K)
    place = tl.atomic_add(counts + local, 1, mask=ours, sem="relaxed")
    tl.store(pairs + local.to(tl.int64) * rows + place, pair, mask=ours & (place < rows))


@triton.jit
def _top_k(
    score, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    K: tl.constexpr, RENORMALIZE: tl.constexpr,
):  # fmt: skip
    choice, expert = tl.arange(0, K), tl.arange(0, EXPERTS)
    score = tl.where(expert < NUM_EXPERTS, score, float("-inf"))
    score = tl.exp(score - tl.max(score, 0))
    score = score / tl.sum(score, 0)
    score = tl.where(score == score, score, 0.0)  # a NaN row still chooses each expert once
    chosen = tl.zeros((K,), tl.int32)
    bits = tl.zeros((K,), tl.int32)
    # NOTE: as bits, for a warp finds the maximum of integers in one instruction.
    left = tl.where(expert < NUM_EXPERTS, score.to(tl.int32, bitcast=True), -1)
    for j in tl.static_range(TOP_K):
        best = tl.max(left, 0)
        at = tl.min(tl.where(left == best, expert, EXPERTS), 0)
        chosen = tl.where(choice == j, at, chosen)
        bits = tl.where(choice == j, best, bits)
        left = tl.where(expert == at, -1, left)
    weight = bits.to(tl.float32, bitcast=True)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, 0)
    return chosen, weight  # both [K]
