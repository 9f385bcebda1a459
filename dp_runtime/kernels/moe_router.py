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
SPLIT = 128  # columns of hidden that a program sums
BLOCK_M = 16


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
    n, num_experts, device = len(rows), len(router), rows.device
    routing = Routing(
        weights=torch.empty(n, top_k, dtype=torch.float32, device=device),
        local_ids=torch.empty(n, top_k, dtype=torch.int32, device=device),
        counts=torch.empty(num_local, dtype=torch.int32, device=device),
        pairs=torch.empty(num_local, n, dtype=torch.int32, device=device),
    )
    parts = logits_in_parts(rows, router, routing.counts)
    pdl = overlaps(device)
    choices, position = (routing.local_ids, 0) if kept is None else (kept.ids, kept.position)
    _route_kernel[(n,)](
        parts, router, row_ranges, routing.weights, routing.local_ids, routing.counts,
        routing.pairs, choices, n, row_ranges.shape[1], first_expert, num_local,
        choices.stride(0), position, KEEPS=kept is not None,
        PARTS=parts.shape[0], NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts), TOP_K=top_k, K=triton.next_power_of_2(top_k),
        RANKS=triton.next_power_of_2(row_ranges.shape[1]), RENORMALIZE=renormalize,
        PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return routing


def parts_shape(rows: int, hidden: int, num_experts: int) -> tuple[int, int, int]:
    splits = triton.cdiv(hidden, SPLIT) if rows <= MAX_SPLIT_ROWS else 1
    return splits, rows, num_experts


def logits_in_parts(rows: Tensor, router: Tensor, counts: Tensor) -> Tensor:
    """Compute [parts, rows, experts], whose sum is rows @ router.T; also set counts to 0."""
    (n, hidden), num_experts = rows.shape, len(router)
    if n > MAX_SPLIT_ROWS:
        counts.zero_()
        return F.linear(rows, router)[None]
    parts = rows.new_empty(parts_shape(n, hidden, num_experts), dtype=torch.float32)
    pdl = overlaps(rows.device)
    _product_kernel[(triton.cdiv(n, BLOCK_M), len(parts))](
        rows, router, parts, counts, rows.stride(0), n, len(counts),
        HIDDEN=hidden, NUM_EXPERTS=num_experts,
        EXPERTS=max(16, triton.next_power_of_2(num_experts)),
        LOCAL=triton.next_power_of_2(max(1, len(counts))), BLOCK_M=BLOCK_M, BLOCK_K=SPLIT,
        PDL=pdl, num_warps=4 if num_experts <= 128 else 8, launch_pdl=pdl,
    )  # fmt: skip
    return parts


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x, router, parts, counts, x_stride, rows, num_local,
    HIDDEN: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, EXPERTS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    within = (k < HIDDEN)[None, :]
    at = router + expert[:, None] * HIDDEN + k
    weight = tl.load(at, mask=(expert < NUM_EXPERTS)[:, None] & within, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < rows)[:, None]
    a = tl.load(x + row.to(tl.int64)[:, None] * x_stride + k, mask=inside & within, other=0.0)
    logits = tl.dot(a, weight.T, input_precision="ieee")
    at = parts + (tl.program_id(1) * rows + row[:, None]) * NUM_EXPERTS + expert
    tl.store(at, logits, mask=inside & (expert < NUM_EXPERTS))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        local = tl.arange(0, LOCAL)
        tl.store(counts + local, tl.zeros((LOCAL,), tl.int32), mask=local < num_local)


@triton.jit(do_not_specialize=["choices", "rows", "first_expert", "choices_stride", "position"])
def _route_kernel(
    parts, router, row_ranges, weights, local_ids, counts, pairs, choices,
    rows, dp_size, first_expert, num_local, choices_stride, position, KEEPS: tl.constexpr,
    PARTS: tl.constexpr, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, TOP_K: tl.constexpr,
    K: tl.constexpr, RANKS: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
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
    inside = tl.where(is_real, expert, NUM_EXPERTS) < NUM_EXPERTS
    score = tl.zeros((EXPERTS,), tl.float32)
    at = parts + row.to(tl.int64) * NUM_EXPERTS + expert
    for part in tl.static_range(PARTS):
        of_part = at + part * rows.to(tl.int64) * NUM_EXPERTS
        score += tl.load(of_part, mask=inside, other=0.0).to(tl.float32)
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
    expert = tl.arange(0, EXPERTS)
    score = tl.where(expert < NUM_EXPERTS, score, float("-inf"))
    score = tl.exp(score - tl.max(score, 0))
    score = score / tl.sum(score, 0)
    score = tl.where(score == score, score, 0.0)  # a NaN row still chooses each expert once
    choice = tl.arange(0, K)
    chosen = tl.zeros((K,), tl.int32)
    weight = tl.zeros((K,), tl.float32)
    left = tl.where(expert < NUM_EXPERTS, score, -1.0)
    for j in tl.static_range(TOP_K):
        best, at = tl.max(left, 0, return_indices=True, return_indices_tie_break_left=True)
        chosen = tl.where(choice == j, at, chosen)
        weight = tl.where(choice == j, best, weight)
        left = tl.where(expert == at, -1.0, left)
    if RENORMALIZE:
        weight = weight / tl.sum(weight, 0)
    return chosen, weight  # both [K]
