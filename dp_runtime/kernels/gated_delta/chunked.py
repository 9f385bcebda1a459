"""The gated delta rule in chunks of 64 rows (arXiv 2412.06464, section 3.3), for prefill.

With G the sum of the log decays since a chunk began, S the state before it, and T the inverse of
1 + tril(beta_i k_i.k_j exp(G_i - G_j), -1): values U = T (beta v), reads W = T (beta exp(G) k),
changes D = U - W S; outputs exp(G) q S + tril(q_i.k_j exp(G_i - G_j)) D; and
S = exp(G_last) S + k^T (exp(G_last - G) D). Only differences of G that are not positive, and G
itself, are exponentiated. Products take operands of the model's dtype and sum in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.core.recurrent_metadata import CHUNK, RecurrentMetadata
from dp_runtime.kernels.gated_delta.rows import DeltaRows, HeadShape
from dp_runtime.kernels.gated_delta.unit_triangle import inverse
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, overlaps

STATE_COLUMNS = 32  # of a head's state, in a program that takes one chunk after the other
OUTPUT_COLUMNS = 128


def run_chunks(
    rows: DeltaRows,
    shape: HeadShape,
    states: Tensor,  # [slots, num_v_heads, head_k_dim, head_v_dim], written
    out: Tensor,  # [rows, num_v_heads, head_v_dim], written
    sequences: RecurrentMetadata,
    norm_eps: float,
) -> None:
    """Run the rows of the pass's chunked sequences, none of which has drafts, now or before."""
    assert all(x.is_contiguous() for x in (states, out)), "states and outputs are contiguous"
    tables = sequences.row_blocks
    chunks = tables.blocks[: tables.num_chunks]
    if not tables.num_chunks:
        return
    heads, k_dim, v_dim = shape.num_v_heads, shape.head_k_dim, shape.head_v_dim
    dtype, device, size = rows.qkv.dtype, out.device, rows.num_rows
    values = torch.empty(size, heads, v_dim, dtype=dtype, device=device)
    reads = torch.empty(size, heads, k_dim, dtype=dtype, device=device)
    scales = torch.empty(size, 2, heads, dtype=torch.float32, device=device)
    before = torch.empty(tables.num_chunks, heads, k_dim, v_dim, dtype=dtype, device=device)
    pdl = overlaps(device)
    sizes = {
        "K_HEADS": shape.num_k_heads, "HEADS": heads, "K_DIM": k_dim, "V_DIM": v_dim,
        "BLOCK_K": _block(k_dim), "CHUNK": CHUNK, "PDL": pdl, "launch_pdl": pdl,
    }  # fmt: skip
    _solve_kernel[(heads, 1, tables.num_chunks)](
        rows.qkv, rows.gates, values, reads, scales, chunks, sequences.cu_seqlens, norm_eps,
        BLOCK_V=_block(v_dim), num_warps=8, **sizes,
    )  # fmt: skip
    block = min(_block(v_dim), STATE_COLUMNS)
    _state_kernel[(triton.cdiv(v_dim, block), heads, len(tables.chunked))](
        rows.qkv, values, reads, scales, before, states,
        tables.chunked, sequences.cu_seqlens, sequences.slots, sequences.is_fresh,
        BLOCK_V=block, num_warps=4, num_stages=2, **sizes,
    )  # fmt: skip
    block = min(_block(v_dim), OUTPUT_COLUMNS)
    _output_kernel[(triton.cdiv(v_dim, block), heads, tables.num_chunks)](
        rows.qkv, values, scales, before, out, chunks, sequences.cu_seqlens, k_dim**-0.5, norm_eps,
        BLOCK_V=block, num_warps=8, **sizes,
    )  # fmt: skip


def _block(size: int) -> int:
    power: int = triton.next_power_of_2(size)
    return max(16, power)  # a matrix unit takes no fewer columns


@triton.jit
def _solve_kernel(
    qkv, gates, values, reads, scales, chunks, cu_seqlens, eps,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Solve a chunk's system: U, W, and per row G and 1 / |k|."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(0)
    dtype = qkv.dtype.element_ty
    at = tl.arange(0, CHUNK)
    row, is_row = _rows_of(chunks, cu_seqlens, at, CHUNK)
    k = _k_rows(qkv, row, is_row, head, 1, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
    norm = _norm(k, eps)
    gate = gates + row * 2 * HEADS + head
    total = tl.cumsum(tl.load(gate, mask=is_row, other=0.0), 0)
    beta = tl.load(gate + HEADS, mask=is_row, other=0.0)
    scale = scales + row * 2 * HEADS + head
    tl.store(scale, total, mask=is_row)
    tl.store(scale + HEADS, norm, mask=is_row)
    products = tl.dot(k, tl.trans(k), input_precision="tf32x3")
    products *= (beta * norm)[:, None] * norm[None, :]
    earlier = at[:, None] > at[None, :]
    solved = inverse(products * _decays(total, earlier), CHUNK).to(dtype)
    v_at = tl.arange(0, BLOCK_V)
    v = qkv + row[:, None] * (2 * K_HEADS * K_DIM + HEADS * V_DIM) + 2 * K_HEADS * K_DIM
    inside = is_row[:, None] & (v_at < V_DIM)[None, :]
    v = tl.load(v + head * V_DIM + v_at[None, :], mask=inside, other=0.0)
    u = tl.dot(solved, (v * beta[:, None]).to(dtype), input_precision="tf32x3")
    into = values + (row[:, None] * HEADS + head) * V_DIM + v_at[None, :]
    tl.store(into, u.to(dtype), mask=inside)
    read = (k * (beta * norm * tl.exp(total))[:, None]).to(dtype)
    w = tl.dot(solved, read, input_precision="tf32x3")
    k_at = tl.arange(0, BLOCK_K)
    into = reads + (row[:, None] * HEADS + head) * K_DIM + k_at[None, :]
    tl.store(into, w.to(dtype), mask=is_row[:, None] & (k_at < K_DIM)[None, :])


@triton.jit
def _state_kernel(
    qkv, values, reads, scales, before, states, chunked, cu_seqlens, slots, is_fresh,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Take a sequence's chunks in turn: keep the state before each, and turn U into D."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(1)
    dtype = qkv.dtype.element_ty
    request = tl.load(chunked + 2 * tl.program_id(2)).to(tl.int64)
    chunk = tl.load(chunked + 2 * tl.program_id(2) + 1).to(tl.int64)
    slot = tl.load(slots + request).to(tl.int64)
    has_past = (slot != 0) & (tl.load(is_fresh + request) == 0)
    start, end = tl.load(cu_seqlens + request), tl.load(cu_seqlens + request + 1)
    at, k_at = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    v_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    is_v = (v_at < V_DIM)[None, :]
    inside = (k_at < K_DIM)[:, None] & is_v
    tile = head * K_DIM * V_DIM + k_at[:, None] * V_DIM + v_at[None, :]
    own = states + slot * (HEADS * K_DIM * V_DIM) + tile
    is_read = (k_at < tl.where(has_past, K_DIM, 0))[:, None] & is_v
    state = tl.load(own, mask=is_read, other=0.0).to(tl.float32)
    for first in range(start, end, CHUNK):
        operand = state.to(dtype)
        tl.store(before + chunk * (HEADS * K_DIM * V_DIM) + tile, operand, mask=inside)
        row = (first + at).to(tl.int64)
        is_row = first + at < end
        w_at = reads + (row[:, None] * HEADS + head) * K_DIM + k_at[None, :]
        w = tl.load(w_at, mask=is_row[:, None] & (k_at < K_DIM)[None, :], other=0.0)
        u_at = values + (row[:, None] * HEADS + head) * V_DIM + v_at[None, :]
        u = tl.load(u_at, mask=is_row[:, None] & is_v, other=0.0).to(tl.float32)
        change = u - tl.dot(w, operand, input_precision="tf32x3")
        tl.store(u_at, change.to(dtype), mask=is_row[:, None] & is_v)
        scale = scales + row * 2 * HEADS + head
        total = tl.load(scale, mask=is_row, other=0.0)
        norm = tl.load(scale + HEADS, mask=is_row, other=0.0)
        last_row = tl.minimum(first + CHUNK, end) - 1
        last = tl.load(scales + last_row.to(tl.int64) * 2 * HEADS + head)
        change *= (norm * tl.exp(tl.where(is_row, last - total, 0.0)))[:, None]
        k = _k_rows(qkv, row, is_row, head, 1, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
        state *= tl.exp(last)
        state += tl.dot(tl.trans(k), change.to(dtype), input_precision="tf32x3")
        chunk += 1
    is_kept = (k_at < tl.where(slot != 0, K_DIM, 0))[:, None] & is_v
    tl.store(own, state.to(states.dtype.element_ty), mask=is_kept)


@triton.jit
def _output_kernel(
    qkv, values, scales, before, out, chunks, cu_seqlens, q_scale, eps,
    K_HEADS: tl.constexpr, HEADS: tl.constexpr, K_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    head = tl.program_id(1)
    dtype = qkv.dtype.element_ty
    chunk = tl.program_id(2).to(tl.int64)
    at, k_at = tl.arange(0, CHUNK), tl.arange(0, BLOCK_K)
    v_at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    row, is_row = _rows_of(chunks, cu_seqlens, at, CHUNK)
    q = _k_rows(qkv, row, is_row, head, 0, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
    k = _k_rows(qkv, row, is_row, head, 1, K_HEADS, HEADS, K_DIM, V_DIM, BLOCK_K)
    scale = scales + row * 2 * HEADS + head
    total = tl.load(scale, mask=is_row, other=0.0)
    k_norm = tl.load(scale + HEADS, mask=is_row, other=0.0)
    q_norm = _norm(q, eps) * q_scale
    state = before + ((chunk * HEADS + head) * K_DIM + k_at[:, None]) * V_DIM + v_at[None, :]
    inside = (k_at < K_DIM)[:, None] & (v_at < V_DIM)[None, :]
    state = tl.load(state, mask=inside, other=0.0)
    result = tl.dot(q, state, input_precision="tf32x3") * (q_norm * tl.exp(total))[:, None]
    scores = tl.dot(q, tl.trans(k), input_precision="tf32x3")
    scores *= q_norm[:, None] * k_norm[None, :]
    scores *= _decays(total, (at[:, None] >= at[None, :]) & is_row[:, None])
    is_v = is_row[:, None] & (v_at < V_DIM)[None, :]
    columns = (row[:, None] * HEADS + head) * V_DIM + v_at[None, :]
    change = tl.load(values + columns, mask=is_v, other=0.0)
    result += tl.dot(scores.to(dtype), change, input_precision="tf32x3")
    tl.store(out + columns, result.to(dtype), mask=is_v)


@triton.jit
def _rows_of(chunks, cu_seqlens, at, CHUNK: tl.constexpr):
    request = tl.load(chunks + 2 * tl.program_id(2))
    first = tl.load(chunks + 2 * tl.program_id(2) + 1) * CHUNK
    row = tl.load(cu_seqlens + request) + first + at
    return row.to(tl.int64), row < tl.load(cu_seqlens + request + 1)


@triton.jit
def _k_rows(
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


@triton.jit
def _decays(total, seen):
    """Compute exp(G_i - G_j) where j is seen by i, and 0 elsewhere."""
    between = tl.where(seen, total[:, None] - total[None, :], 0.0)
    return tl.where(seen, tl.exp(between), 0.0)
