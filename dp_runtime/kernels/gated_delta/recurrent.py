"""The gated delta rule row by row: decodes, verifications, and chunks of a few rows."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.core.recurrent_metadata import RecurrentMetadata
from dp_runtime.kernels.gated_delta.rows import DeltaRows, HeadShape
from dp_runtime.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    overlaps,
)

COLUMNS_AT_ONCE = 32  # of a head's state, in a program of one warp, which waits for no other


def step_rows(
    rows: DeltaRows,
    shape: HeadShape,
    states: Tensor,  # [slots, num_v_heads, head_k_dim, head_v_dim] float32, written
    out: Tensor,  # [rows, num_v_heads, head_v_dim], written
    sequences: RecurrentMetadata,
    norm_eps: float,
) -> None:
    """Run the rows of the pass's stepped sequences in float32, after the accepted drafts.

    Each state is read once and written once, as it is before this pass's drafts. Rows give the
    same bits in whatever number they come.
    """
    drafts, stepped = sequences.drafts, sequences.row_blocks.stepped
    if not stepped.shape[0]:
        return
    assert states.is_contiguous(), "states are contiguous"
    assert out.is_contiguous(), "outputs are contiguous"
    pdl = overlaps(out.device)
    constants = _constants(shape, rows.max_drafts, pdl)
    arguments = (
        rows.qkv, rows.gates, states, out,
        stepped, sequences.cu_seqlens, sequences.slots, sequences.is_fresh,
        drafts and drafts.num_drafts, drafts and drafts.num_accepted,
        shape.head_k_dim**-0.5, norm_eps, rows.num_rows,
    )  # fmt: skip
    grid = (-(-shape.head_v_dim // constants["BLOCK_V"]), shape.num_v_heads, stepped.shape[0])
    launch(_step_kernel, grid, arguments, constants, num_warps=1, launch_pdl=pdl)


@cache
def _constants(shape: HeadShape, max_drafts: int, pdl: bool) -> Mapping[str, int]:
    k_dim, v_dim = shape.head_k_dim, shape.head_v_dim
    return {
        "K_HEADS": shape.num_k_heads, "HEADS": shape.num_v_heads, "K_DIM": k_dim, "V_DIM": v_dim,
        "MAX_DRAFTS": max_drafts, "BLOCK_K": triton.next_power_of_2(k_dim),
        "BLOCK_V": min(COLUMNS_AT_ONCE, triton.next_power_of_2(v_dim)), "PDL": pdl,
    }  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _step_kernel(
    qkv, gates, states, out, stepped, cu_seqlens, slots, is_fresh, num_drafts, num_accepted,
    scale, eps, num_rows,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    MAX_DRAFTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    request = tl.load(stepped + tl.program_id(2)).to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    has_past = (slot != 0) & (tl.load(is_fresh + request) == 0)
    k_at = tl.arange(0, BLOCK_K)
    v_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    v_in = v_at < V_DIM
    at = states + ((slot * HEADS + head) * K_DIM + k_at[:, None]) * V_DIM + v_at[None, :]
    is_read = (k_at < tl.where(has_past, K_DIM, 0))[:, None]
    # A pass wrote the state that this one reads: no kernel since, so the load waits for none.
    state = tl.load(at, mask=is_read & v_in, other=0.0).to(tl.float32)
    start = tl.load(cu_seqlens + request)
    length = tl.load(cu_seqlens + request + 1) - start
    accepted, last = 0, length - 1
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if MAX_DRAFTS:
        accepted = tl.where(has_past, tl.load(num_accepted + request), 0).to(tl.int32)
        last = length - tl.load(num_drafts + request).to(tl.int32) - 1  # before the drafts
    first = num_rows + request * MAX_DRAFTS + accepted
    row = tl.where(accepted > 0, first - accepted, start.to(tl.int64))
    q, k, v, g, beta = load_row(qkv, gates, row, head, k_at, v_at, K_HEADS, HEADS, K_DIM, V_DIM)
    for index in range(-accepted, length):
        # The next row is on its way while this one is computed; the last loads itself again.
        after = tl.minimum(index + 1, length - 1)
        row = tl.where(after < 0, first + after, (start + after).to(tl.int64))
        next_q, next_k, next_v, next_g, next_beta = load_row(
            qkv, gates, row, head, k_at, v_at, K_HEADS, HEADS, K_DIM, V_DIM
        )
        state, result = step_row(state, q, k, v, g, beta, scale, eps)
        into = out + ((start + index).to(tl.int64) * HEADS + head) * V_DIM + v_at
        is_out = v_at < tl.where(index >= 0, V_DIM, 0)
        tl.store(into, result.to(out.dtype.element_ty), mask=is_out)
        if index == last:
            is_kept = (k_at < tl.where(slot != 0, K_DIM, 0))[:, None]
            tl.store(at, state.to(states.dtype.element_ty), mask=is_kept & v_in)
        q, k, v, g, beta = next_q, next_k, next_v, next_g, next_beta


@triton.jit
def load_row(
    qkv, gates, row, head, k_at, v_at,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """Load a row's q, k, some columns of its v, the log of its decay, and beta."""
    channels: tl.constexpr = 2 * K_HEADS * K_DIM + HEADS * V_DIM
    q_at = qkv + row * channels + head // (HEADS // K_HEADS) * K_DIM + k_at
    q = tl.load(q_at, mask=k_at < K_DIM, other=0.0)
    k = tl.load(q_at + K_HEADS * K_DIM, mask=k_at < K_DIM, other=0.0)
    v_from = qkv + row * channels + 2 * K_HEADS * K_DIM + head * V_DIM
    v = tl.load(v_from + v_at, mask=v_at < V_DIM, other=0.0)
    gate = gates + row * 2 * HEADS + head
    return q, k, v, tl.load(gate), tl.load(gate + HEADS)


@triton.jit
def step_row(state, q, k, v, g, beta, scale, eps):
    """Take some columns of a head's state past one row; return them, and the row's outputs."""
    q, k, decay = q.to(tl.float32), k.to(tl.float32), tl.exp(g)
    q *= tl.rsqrt(tl.sum(q * q, 0) + eps) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + eps)
    of_k, of_q = tl.sum(state * k[:, None], 0), tl.sum(state * q[:, None], 0)
    change = (v.to(tl.float32) - decay * of_k) * beta
    result = decay * of_q + tl.sum(q * k, 0) * change
    return state * decay + k[:, None] * change[None, :], result
