"""The gated delta rule row by row: decodes, verifications, and chunks of a few rows."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.core.recurrent_metadata import RecurrentMetadata
from dp_runtime.kernels.gated_delta.rows import DeltaRows, HeadShape
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, overlaps

COLUMNS_AT_ONCE = 32  # of a head's state, in a program: 128 bytes of each of its rows


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
    assert all(x.is_contiguous() for x in (states, out)), "states and outputs are contiguous"
    drafts, stepped = sequences.drafts, sequences.row_blocks.stepped
    if not len(stepped):
        return
    k_dim, v_dim, pdl = shape.head_k_dim, shape.head_v_dim, overlaps(out.device)
    block = min(COLUMNS_AT_ONCE, triton.next_power_of_2(v_dim))
    _step_kernel[(triton.cdiv(v_dim, block), shape.num_v_heads, len(stepped))](
        rows.qkv, rows.gates, states, out,
        stepped, sequences.cu_seqlens, sequences.slots, sequences.is_fresh,
        drafts and drafts.num_drafts, drafts and drafts.num_accepted,
        k_dim**-0.5, norm_eps, rows.num_rows,
        K_HEADS=shape.num_k_heads, HEADS=shape.num_v_heads, K_DIM=k_dim, V_DIM=v_dim,
        MAX_DRAFTS=rows.max_drafts, BLOCK_K=triton.next_power_of_2(k_dim), BLOCK_V=block,
        PDL=pdl, num_warps=2, launch_pdl=pdl,
    )  # fmt: skip


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
    for index in range(-accepted, length):
        replay = num_rows + request * MAX_DRAFTS + accepted + index
        row = tl.where(index < 0, replay, (start + index).to(tl.int64))
        state, q = step_row(
            state, qkv, gates, row, head, k_at, v_at, scale, eps, K_HEADS, HEADS, K_DIM, V_DIM
        )
        result = tl.sum(state * q[:, None], 0).to(out.dtype.element_ty)
        into = out + ((start + index).to(tl.int64) * HEADS + head) * V_DIM + v_at
        tl.store(into, result, mask=v_at < tl.where(index >= 0, V_DIM, 0))
        if index == last:
            is_kept = (k_at < tl.where(slot != 0, K_DIM, 0))[:, None]
            tl.store(at, state.to(states.dtype.element_ty), mask=is_kept & v_in)


@triton.jit
def step_row(
    state, qkv, gates, row, head, k_at, v_at, scale, eps,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """Take some columns of a head's state past one row; return them, and the row's scaled q."""
    group: tl.constexpr = HEADS // K_HEADS
    channels: tl.constexpr = 2 * K_HEADS * K_DIM + HEADS * V_DIM
    k_in, v_in = k_at < K_DIM, v_at < V_DIM
    q_at = qkv + row * channels + head // group * K_DIM + k_at
    q = tl.load(q_at, mask=k_in, other=0.0).to(tl.float32)
    k = tl.load(q_at + K_HEADS * K_DIM, mask=k_in, other=0.0).to(tl.float32)
    v = tl.load(qkv + row * channels + 2 * K_HEADS * K_DIM + head * V_DIM + v_at, mask=v_in)
    gate = gates + row * 2 * HEADS + head
    q *= tl.rsqrt(tl.sum(q * q, 0) + eps) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + eps)
    state *= tl.exp(tl.load(gate))
    change = (v.to(tl.float32) - tl.sum(state * k[:, None], 0)) * tl.load(gate + HEADS)
    return state + k[:, None] * change[None, :], q
