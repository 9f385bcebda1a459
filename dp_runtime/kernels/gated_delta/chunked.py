"""The gated delta rule in chunks of 64 rows (arXiv 2412.06464, section 3.3), for prefill.

With G the sum of the log decays since a chunk began, S the state before it, and T the inverse of
1 + tril(beta_i k_i.k_j exp(G_i - G_j), -1): values U = T (beta v), reads W = T (beta exp(G) k),
changes D = U - W S; outputs exp(G) q S + P D with scores P = tril(q_i.k_j exp(G_i - G_j)); and
S = exp(G_last) S + k^T (exp(G_last - G) D). Only differences of G that are not positive, and G
itself, are exponentiated. Products take operands of the model's dtype and sum in float32.

Of U, W and P all chunks are computed at once; S then goes through a sequence's chunks in turn, and
can be left in a slot of a prefix cache on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.core.recurrent_metadata import CHUNK, RecurrentMetadata
from dp_runtime.kernels.gated_delta.recurrent import load_row, step_row
from dp_runtime.kernels.gated_delta.rows import DeltaRows, HeadShape
from dp_runtime.kernels.gated_delta.unit_triangle import inverse
from dp_runtime.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    launch,
    overlaps,
)

MIN_PROGRAMS = 128  # that take the chunks of one sequence in turn: one for each multiprocessor
MAX_STAGE = 64 * 1024  # bytes of a chunk's operands, of which three fit in shared memory


def run_chunks(
    rows: DeltaRows,
    shape: HeadShape,
    states: Tensor,  # [slots, num_v_heads, head_k_dim, head_v_dim], written
    out: Tensor,  # [rows, num_v_heads, head_v_dim], written
    sequences: RecurrentMetadata,
    norm_eps: float,
) -> None:
    """Run the rows of the pass's chunked sequences, after the accepted drafts; none has new ones.

    Only a state out of a prefix cache has drafts before a chunk.
    """
    tables, drafts, tracks = sequences.row_blocks, sequences.drafts, sequences.tracks
    if not tables.num_chunks:
        return
    assert states.is_contiguous(), "states are contiguous"
    assert out.is_contiguous(), "outputs are contiguous"
    heads, num_rows, pdl = shape.num_v_heads, rows.num_rows, overlaps(out.device)
    solving, running = _constants(shape, out.dtype, rows.max_drafts, pdl)
    made = out.new_empty(num_rows, heads, shape.head_v_dim + shape.head_k_dim + CHUNK)
    scales = torch.empty(3, heads, num_rows, dtype=torch.float32, device=out.device)
    inputs, scalars = (rows.qkv, rows.gates, made, scales), (shape.head_k_dim**-0.5, norm_eps)
    launch(
        _solve_kernel, (heads, tables.num_chunks, 1),
        (*inputs, tables.blocks, sequences.cu_seqlens, *scalars, num_rows), solving,
        num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    arguments = (
        *inputs, states, out, tables.chunked, sequences.cu_seqlens, sequences.slots,
        sequences.is_fresh, drafts and drafts.num_accepted, tracks and tracks.slots,
        tracks and tracks.rows, *scalars, num_rows,
    )  # fmt: skip
    programs = -(-shape.head_v_dim // running["BLOCK_V"]) * heads
    launch(
        _state_kernel, (programs, tables.chunked.shape[0], 1), arguments, running,
        num_warps=4, num_stages=_num_stages(running, out.dtype), launch_pdl=pdl,
    )  # fmt: skip


@cache
def _constants(
    shape: HeadShape, dtype: torch.dtype, max_drafts: int, pdl: bool
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    heads, k_dim, v_dim = shape.num_v_heads, shape.head_k_dim, shape.head_v_dim
    sizes = {
        "K_HEADS": shape.num_k_heads, "HEADS": heads, "K_DIM": k_dim, "V_DIM": v_dim,
        "BLOCK_K": _block(k_dim, dtype),
    }  # fmt: skip
    widest, fixed = _block(v_dim, dtype), {"CHUNK": CHUNK, "PDL": pdl}
    block = 64 if heads * v_dim >= 64 * MIN_PROGRAMS else 32  # columns of a head's state
    running = {"MAX_DRAFTS": max_drafts, **sizes, "BLOCK_V": min(widest, block), **fixed}
    return {**sizes, "BLOCK_V": widest, **fixed}, running


def _num_stages(sizes: Mapping[str, int], dtype: torch.dtype) -> int:
    columns = 3 * sizes["BLOCK_K"] + sizes["BLOCK_V"] + CHUNK  # of q, k, W, U and P
    return 3 if CHUNK * columns * dtype.itemsize <= MAX_STAGE else 2


def scratch_bytes(rows: int, shape: HeadShape, size: int) -> int:
    """Count the bytes that `run_chunks` allocates for rows of elements of `size` bytes."""
    return rows * shape.num_v_heads * ((shape.head_v_dim + shape.head_k_dim + CHUNK) * size + 12)


def _block(size: int, dtype: torch.dtype) -> int:
    power: int = triton.next_power_of_2(size)
    # NOTE: Triton 3.6 miscompiles products of 16 columns of fp16 for SM90: with 16 of k and of v
    # the values are wrong, with 32 of k and 16 of v addresses are. Float32 needs no more than 16.
    return max(64 // dtype.itemsize, power)


@triton.jit(do_not_specialize=["num_rows"])
def _solve_kernel(
    qkv, gates, made, scales, chunks, cu_seqlens, q_scale, eps, num_rows,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Make a chunk's U, W and P, side by side, and of each row G, 1 / |k| and exp(G) / |q|."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    dtype = qkv.dtype.element_ty
    at, k_at, v_at = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_V)
    request = tl.load(chunks + 2 * tl.program_id(1))
    first = tl.load(chunks + 2 * tl.program_id(1) + 1) * CHUNK
    row = (tl.load(cu_seqlens + request) + first + at).to(tl.int64)
    is_row = row < tl.load(cu_seqlens + request + 1)
    gate = gates + row * 2 * HEADS + head
    total = tl.cumsum(tl.load(gate, mask=is_row, other=0.0), 0)
    beta = tl.load(gate + HEADS, mask=is_row, other=0.0)
    q = _head_rows(qkv, row, is_row, head, 0, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
    k = _head_rows(qkv, row, is_row, head, 1, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
    q_norm, k_norm = _norm(q, eps) * q_scale, _norm(k, eps)
    scale, apart = scales + head.to(tl.int64) * num_rows + row, HEADS * num_rows
    tl.store(scale, total, mask=is_row)
    tl.store(scale + apart, k_norm, mask=is_row)
    tl.store(scale + 2 * apart, q_norm * tl.exp(total), mask=is_row)
    into = made + (row[:, None] * HEADS + head) * (V_DIM + K_DIM + CHUNK)
    seen = at[:, None] >= at[None, :]
    decays = tl.exp(tl.where(seen, total[:, None] - total[None, :], 0.0)) * k_norm[None, :]
    decays = tl.where(seen, decays, 0.0)
    score = tl.dot(q, tl.trans(k), input_precision="tf32x3") * decays * q_norm[:, None]
    tl.store(into + V_DIM + K_DIM + at[None, :], score.to(dtype), mask=is_row[:, None])
    system = tl.dot(k, tl.trans(k), input_precision="tf32x3") * decays
    system *= (beta * k_norm)[:, None]
    system = tl.where(at[:, None] > at[None, :], system, 0.0)
    # What bf16 will round may come of tf32 products, which are a third of those of float32.
    precision: tl.constexpr = "tf32" if dtype == tl.bfloat16 else "tf32x3"
    solved = inverse(system, CHUNK, precision) * beta[None, :]
    is_k = is_row[:, None] & (k_at < K_DIM)[None, :]
    of_k = (solved * (k_norm * tl.exp(total))[None, :]).to(dtype)
    w = tl.dot(of_k, k, input_precision="tf32x3")
    tl.store(into + V_DIM + k_at[None, :], w.to(dtype), mask=is_k)
    is_v = is_row[:, None] & (v_at < V_DIM)[None, :]
    v = qkv + row[:, None] * (2 * K_HEADS * K_DIM + HEADS * V_DIM) + 2 * K_HEADS * K_DIM
    v = tl.load(v + head * V_DIM + v_at[None, :], mask=is_v, other=0.0)
    u = tl.dot(solved.to(dtype), v, input_precision="tf32x3")
    tl.store(into + v_at[None, :], u.to(dtype), mask=is_v)


@triton.jit(do_not_specialize=["num_rows"])
def _state_kernel(
    qkv, gates, made, scales, states, out, chunked, cu_seqlens, slots, is_fresh,
    num_accepted, track_slots, track_rows, q_scale, eps, num_rows, MAX_DRAFTS: tl.constexpr,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Take some columns of a head's state through a sequence's chunks; write their outputs."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0) % HEADS  # the programs of a k head run together: they share its rows
    request = tl.load(chunked + 2 * tl.program_id(1)).to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    has_past = (slot != 0) & (tl.load(is_fresh + request) == 0)
    start, end = tl.load(cu_seqlens + request), tl.load(cu_seqlens + request + 1)
    k_at = tl.arange(0, BLOCK_K)
    v_at = tl.program_id(0) // HEADS * BLOCK_V + tl.arange(0, BLOCK_V)
    is_v = (v_at < V_DIM)[None, :]
    own = states + ((slot * HEADS + head) * K_DIM + k_at[:, None]) * V_DIM + v_at[None, :]
    is_read = (k_at < tl.where(has_past, K_DIM, 0))[:, None] & is_v
    state = tl.load(own, mask=is_read, other=0.0).to(tl.float32)
    if MAX_DRAFTS:
        accepted = tl.where(has_past, tl.load(num_accepted + request), 0).to(tl.int32)
        first_row = num_rows + request * MAX_DRAFTS
        state = _after_drafts(
            state, qkv, gates, first_row, accepted, head, k_at, v_at, q_scale, eps,
            K_HEADS, HEADS, K_DIM, V_DIM,
        )  # fmt: skip
    track, tracked = slot, -1
    if track_slots is not None:
        track = tl.load(track_slots + request).to(tl.int64)
        tracked = tl.where(track != 0, start + tl.load(track_rows + request), -1)
    track_own = own + (track - slot) * HEADS * K_DIM * V_DIM
    for first in range(start, end, CHUNK):
        if track_slots is not None:
            is_left = (k_at < tl.where(first == tracked, K_DIM, 0))[:, None] & is_v
            tl.store(track_own, state.to(states.dtype.element_ty), mask=is_left)
        state = _after_chunk(
            state, qkv, made, scales, out, first, end, head, v_at, num_rows,
            K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K, CHUNK,
        )  # fmt: skip
    is_kept = (k_at < tl.where(slot != 0, K_DIM, 0))[:, None] & is_v
    tl.store(own, state.to(states.dtype.element_ty), mask=is_kept)


@triton.jit
def _after_drafts(
    state, qkv, gates, row, accepted, head, k_at, v_at, q_scale, eps,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
):  # fmt: skip
    """Take the state past the accepted drafts of the pass before, from `row` on."""
    for index in range(accepted):
        q, k, v, g, beta = load_row(
            qkv, gates, row + index, head, k_at, v_at, K_HEADS, HEADS, K_DIM, V_DIM
        )
        state, _ = step_row(state, q, k, v, g, beta, q_scale, eps)
    return state


@triton.jit
def _after_chunk(
    state, qkv, made, scales, out, first, end, head, v_at, num_rows,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Take the state past the chunk from row `first` on, and write the chunk's outputs."""
    dtype = qkv.dtype.element_ty
    at, k_at = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    is_v = (v_at < V_DIM)[None, :]
    row = (first + at).to(tl.int64)
    is_row = first + at < end
    rows_in = is_row[:, None]
    of_head, apart = scales + head.to(tl.int64) * num_rows, HEADS * num_rows
    total = tl.load(of_head + row, mask=is_row, other=0.0)
    k_norm = tl.load(of_head + apart + row, mask=is_row, other=0.0)
    q_decay = tl.load(of_head + 2 * apart + row, mask=is_row, other=0.0)
    last = tl.load(of_head + tl.minimum(first + CHUNK, end) - 1)
    q = _head_rows(qkv, row, is_row, head, 0, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
    k = _head_rows(qkv, row, is_row, head, 1, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
    heads = row[:, None] * HEADS + head
    own = made + heads * (V_DIM + K_DIM + CHUNK)
    w_in = rows_in & (k_at < K_DIM)[None, :]
    w = tl.load(own + V_DIM + k_at[None, :], mask=w_in, other=0.0)
    u = tl.load(own + v_at[None, :], mask=rows_in & is_v, other=0.0)
    score = tl.load(own + V_DIM + K_DIM + at[None, :], mask=rows_in, other=0.0)
    before = state.to(dtype)
    change = u.to(tl.float32) - tl.dot(w, before, input_precision="tf32x3")
    result = tl.dot(q, before, input_precision="tf32x3") * q_decay[:, None]
    result += tl.dot(score, change.to(dtype), input_precision="tf32x3")
    into = out + heads * V_DIM + v_at[None, :]
    tl.store(into, result.to(dtype), mask=rows_in & is_v)
    change *= (k_norm * tl.exp(tl.where(is_row, last - total, 0.0)))[:, None]
    state *= tl.exp(last)
    state += tl.dot(tl.trans(k), change.to(dtype), input_precision="tf32x3")
    return state


@triton.jit
def _head_rows(
    qkv, row, is_row, head, part, K_HEADS: tl.constexpr, HEADS: tl.constexpr,
    K_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Load the rows of q (part 0) or k (part 1) that a v head reads, as the convolution left them.

    They are normed behind the products, in float32: here, that would round them once more.
    """
    k_at = tl.arange(0, BLOCK_K)
    column = part * K_HEADS * K_DIM + head // (HEADS // K_HEADS) * K_DIM + k_at
    at = qkv + row[:, None] * (2 * K_HEADS * K_DIM + HEADS * V_DIM) + column[None, :]
    return tl.load(at, mask=is_row[:, None] & (k_at < K_DIM)[None, :], other=0.0)


@triton.jit
def _norm(x, eps):
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + eps)
