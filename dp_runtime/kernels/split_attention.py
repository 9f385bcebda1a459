"""Attention of short queries over pages, in chunks of keys that programs take in turns.

So all multiprocessors read at once, however few or uneven the sequences are. Which request and
chunk a tile is, programs find on the device: a graph can capture the two kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    num_multiprocessors,
    overlaps,
)

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class SplitTile:
    chunk: int  # keys of a tile, whole pages
    num_warps: int = 4
    num_stages: int = 3
    per_multiprocessor: int = 3  # programs


def split_attention(
    q: Tensor,
    pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    max_seq_len: int,
    scale: float,
    out: Tensor,
    tile: SplitTile,
) -> None:
    """Attend causally with equally many rows of each request, its newest tokens, into `out`.

    q and out [rows, num_heads, head_dim]; pool [pages, 2, num_kv_heads, page_size, head_dim] of q's
    dtype; page_table [requests, n] and seq_lens [requests] int32, each at least its query length.
    """
    (rows, num_heads, head_dim), requests = q.shape, len(seq_lens)
    _, _, num_kv_heads, page_size, _ = pool.shape
    query_len, group = rows // max(requests, 1), num_heads // num_kv_heads
    assert rows == requests * query_len, f"{rows} rows of {requests} requests"
    assert tile.chunk % page_size == 0, f"{tile}: chunks of whole pages of {page_size}"
    if requests == 0:
        return
    max_tiles = requests * num_kv_heads * triton.cdiv(max_seq_len, tile.chunk)
    shape = (max_tiles, query_len * group)
    sums = torch.empty(*shape, head_dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(2, *shape, dtype=torch.float32, device=q.device)  # maxima, totals
    pdl = overlaps(q.device)
    sizes = {
        "HEADS": num_heads, "KV_HEADS": num_kv_heads, "DIM": head_dim, "QUERY_LEN": query_len,
        "ROWS": max(16, triton.next_power_of_2(query_len * group)), "CHUNK": tile.chunk,
        "REQUESTS": triton.next_power_of_2(requests), "PDL": pdl, "launch_pdl": pdl,
    }  # fmt: skip
    programs = min(max_tiles, num_multiprocessors(q.device) * tile.per_multiprocessor)
    split_kernel[(programs,)](
        q, pool, page_table, seq_lens, sums, weights, weights[1], requests, page_table.stride(0),
        scale * LOG2_E, PAGE=page_size, BLOCK=min(page_size, 64), num_warps=tile.num_warps,
        num_stages=tile.num_stages, **sizes,
    )  # fmt: skip
    combine_kernel[(requests, num_kv_heads)](
        sums, weights, weights[1], seq_lens, out, requests, num_warps=4, **sizes
    )


@triton.jit(do_not_specialize=["requests"])
def split_kernel(
    q, pool, page_table, seq_lens, sums, maxima, totals, requests, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, QUERY_LEN: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, REQUESTS: tl.constexpr, PAGE: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group: tl.constexpr = HEADS // KV_HEADS
    ends = _chunk_ends(seq_lens, requests, REQUESTS, CHUNK)
    row, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = row < QUERY_LEN * group
    tile, num_tiles = tl.program_id(0), tl.max(ends, 0) * KV_HEADS
    while tile < num_tiles:
        head, chunk = tile % KV_HEADS, tile // KV_HEADS
        request = tl.sum((ends <= chunk).to(tl.int32), 0)
        begin = (chunk - _chunks_before(ends, request, REQUESTS)) * CHUNK
        length = tl.load(seq_lens + request)
        of_q = (request * QUERY_LEN + row // group) * HEADS + head * group + row % group
        at_q = q + of_q.to(tl.int64)[:, None] * DIM + d
        query = tl.load(at_q, mask=inside[:, None], other=0.0)
        last = length - QUERY_LEN + row // group  # key that a row may see
        peak = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, DIM), tl.float32)
        pages = page_table + request.to(tl.int64) * table_stride
        for start in range(begin, tl.minimum(begin + CHUNK, length), BLOCK):
            page = tl.load(pages + start // PAGE).to(tl.int64)
            token = start % PAGE + tl.arange(0, BLOCK)
            at_k = pool + ((page * 2 * KV_HEADS + head) * PAGE + token)[:, None] * DIM + d
            key = tl.load(at_k)
            value = tl.load(at_k + KV_HEADS * PAGE * DIM)
            score = tl.dot(query, key.T, input_precision="ieee") * scale
            seen = start + tl.arange(0, BLOCK) <= last[:, None]
            score = tl.where(seen, score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            share = tl.exp2(score - base[:, None])
            kept = tl.exp2(peak - base)
            total = total * kept + tl.sum(share, 1)
            product = tl.dot(share.to(value.dtype), value, input_precision="ieee")
            summed = summed * kept[:, None] + product
            peak = higher
        at = tile.to(tl.int64) * QUERY_LEN * group + row
        tl.store(sums + at[:, None] * DIM + d, summed, mask=inside[:, None])
        tl.store(maxima + at, peak, mask=inside)
        tl.store(totals + at, total, mask=inside)
        tile += tl.num_programs(0)


@triton.jit(do_not_specialize=["requests"])
def combine_kernel(
    sums, maxima, totals, seq_lens, out, requests,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, QUERY_LEN: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, REQUESTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    group: tl.constexpr = HEADS // KV_HEADS
    request, head = tl.program_id(0), tl.program_id(1)
    ends = _chunk_ends(seq_lens, requests, REQUESTS, CHUNK)
    first = _chunks_before(ends, request, REQUESTS)
    row, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = row < QUERY_LEN * group
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, DIM), tl.float32)
    for chunk in range(first, first + tl.cdiv(tl.load(seq_lens + request), CHUNK)):
        at = (chunk * KV_HEADS + head).to(tl.int64) * QUERY_LEN * group + row
        more = tl.load(maxima + at, mask=inside, other=0.0)
        higher = tl.maximum(peak, more)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept, share = tl.exp2(peak - base), tl.exp2(more - base)
        total = total * kept + tl.load(totals + at, mask=inside, other=1.0) * share
        part = tl.load(sums + at[:, None] * DIM + d, mask=inside[:, None], other=0.0)
        summed = summed * kept[:, None] + part * share[:, None]
        peak = higher
    of_out = (request * QUERY_LEN + row // group) * HEADS + head * group + row % group
    at_out = out + of_out.to(tl.int64)[:, None] * DIM + d
    tl.store(at_out, (summed / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _chunk_ends(seq_lens, requests, REQUESTS: tl.constexpr, CHUNK: tl.constexpr):
    """Count the chunks up to each request's end."""
    index = tl.arange(0, REQUESTS)
    lengths = tl.load(seq_lens + index, mask=index < requests, other=0)
    return tl.cumsum(tl.cdiv(lengths, CHUNK), 0)


@triton.jit
def _chunks_before(ends, request, REQUESTS: tl.constexpr):
    return tl.max(tl.where(tl.arange(0, REQUESTS) < request, ends, 0), 0)
