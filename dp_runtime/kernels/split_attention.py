"""Attention of short queries over pages, with all blocks of keys dealt out evenly to programs.

So all multiprocessors read at once and equally much, however few or uneven the sequences are. A
program attends over one stretch of blocks, through as many heads and requests as it reaches; what
it finds about each is a part, and a second kernel sums up parts. Which they are, programs find on
the device: a graph can capture both kernels. (The dealing is that of Stream-K, arXiv 2301.03598.)
While the kernel before still runs, what was written long before is read: lengths and page tables.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.kernels.split_tile import MAX_REQUESTS, SplitTile
from dp_runtime.kernels.triton_launch import (
    gdc_launch_dependents,
    gdc_wait,
    num_multiprocessors,
    overlaps,
)

LOG2_E = 1.4426950408889634
VALUES = 4096  # of parts, that a program sums up at once


def split_attention(
    q: Tensor,
    pool: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
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
    assert requests <= MAX_REQUESTS, f"{requests} requests, more than {MAX_REQUESTS}"
    if requests == 0:
        return
    programs = num_multiprocessors(q.device) * tile.per_multiprocessor
    parts = programs + requests * num_kv_heads, query_len * group  # at most, and rows of each
    sums = torch.empty(*parts, head_dim, dtype=torch.float32, device=q.device)
    weights = torch.empty(2, *parts, dtype=torch.float32, device=q.device)  # maxima, totals
    pdl = overlaps(q.device)
    sizes = {
        "HEADS": num_heads, "KV_HEADS": num_kv_heads, "DIM": head_dim, "QUERY_LEN": query_len,
        "REQUESTS": MAX_REQUESTS, "BLOCK": min(page_size, tile.block),
        "PDL": pdl, "launch_pdl": pdl,
    }  # fmt: skip
    all_rows = triton.next_power_of_2(query_len * group)
    split_kernel[(programs,)](
        q, pool, page_table, seq_lens, sums, weights, weights[1], requests, page_table.stride(0),
        scale * LOG2_E, ROWS=max(16, all_rows), PAGE=page_size,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **sizes,
    )  # fmt: skip
    some_rows = min(all_rows, max(1, VALUES // (tile.parts * head_dim)))
    combine_kernel[(requests, num_kv_heads, triton.cdiv(query_len * group, some_rows))](
        sums, weights, weights[1], seq_lens, out, requests, programs, ROWS=some_rows,
        PARTS=tile.parts, num_warps=4, **sizes,
    )  # fmt: skip


# NOTE: no kernel may be compiled while serving: none is for a divisor of what differs by batch.
@triton.jit(
    do_not_specialize=["requests", "table_stride"],
    do_not_specialize_on_alignment=["page_table", "seq_lens", "maxima", "totals"],
)
def split_kernel(
    q, pool, page_table, seq_lens, sums, maxima, totals, requests, table_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, QUERY_LEN: tl.constexpr,
    ROWS: tl.constexpr, REQUESTS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = HEADS // KV_HEADS
    ends = _block_ends(seq_lens, requests, REQUESTS, BLOCK)
    num_blocks = tl.max(ends, 0)
    program = tl.program_id(0)
    shares = tl.minimum(tl.num_programs(0), num_blocks * KV_HEADS)
    at = _share_begin(program, num_blocks * KV_HEADS, shares)
    stop = _share_begin(program + 1, num_blocks * KV_HEADS, shares)
    if program >= shares:
        stop = at
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, d = tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = row < QUERY_LEN * group
    while at < stop:
        head, request, block, after = _stretch(ends, num_blocks, at, stop)
        length = tl.load(seq_lens + request)
        of_q = (request * QUERY_LEN + row // group) * HEADS + head * group + row % group
        at_q = q + of_q.to(tl.int64)[:, None] * DIM + d
        query = tl.load(at_q, mask=inside[:, None], other=0.0)
        last = length - QUERY_LEN + row // group  # key that a row may see
        pages = page_table + request.to(tl.int64) * table_stride
        peak, total, summed = _attend(
            query, last, pool + head * PAGE * DIM, pages, block * BLOCK, after * BLOCK, scale,
            KV_HEADS, PAGE, BLOCK,
        )  # fmt: skip
        part = program + head * requests + request  # one of them is larger than the part's before
        of_part = part.to(tl.int64) * QUERY_LEN * group + row
        tl.store(sums + of_part[:, None] * DIM + d, summed, mask=inside[:, None])
        tl.store(maxima + of_part, peak, mask=inside)
        tl.store(totals + of_part, total, mask=inside)
        at += after - block


@triton.jit
def _stretch(ends, num_blocks, at, stop):
    head, block = at // num_blocks, at % num_blocks
    request = tl.sum((ends <= block).to(tl.int32), 0)
    first = tl.max(tl.where(ends <= block, ends, 0), 0)
    after = tl.min(tl.where(ends <= block, num_blocks, ends), 0)
    after = tl.minimum(after, stop - head * num_blocks)
    return head, request, block - first, after - first  # blocks of that request: begin, end


@triton.jit
def _attend(
    query, last, pool, pages, begin, end, scale,
    KV_HEADS: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Attend over keys from begin up to end in one head's part of the pool."""
    rows: tl.constexpr = query.shape[0]
    dim: tl.constexpr = query.shape[1]
    peak = tl.full((rows,), float("-inf"), tl.float32)
    total = tl.zeros((rows,), tl.float32)
    summed = tl.zeros((rows, dim), tl.float32)
    page = tl.load(pages + begin // PAGE).to(tl.int64)
    for start in range(begin, end, BLOCK):
        token = page * 2 * KV_HEADS * PAGE + start % PAGE + tl.arange(0, BLOCK)
        at_k = pool + token[:, None] * dim + tl.arange(0, dim)
        key = tl.load(at_k)
        value = tl.load(at_k + KV_HEADS * PAGE * dim)
        # NOTE: keys are read ahead only if the number of their page is known a block before.
        page = tl.load(pages + tl.minimum(start + BLOCK, end - 1) // PAGE).to(tl.int64)
        score = tl.dot(query, key.T, input_precision="ieee") * scale
        score = tl.where(start + tl.arange(0, BLOCK) <= last[:, None], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        share = tl.exp2(score - base[:, None])
        kept = tl.exp2(peak - base)
        total = total * kept + tl.sum(share, 1)
        product = tl.dot(share.to(value.dtype), value, input_precision="ieee")
        summed = summed * kept[:, None] + product
        peak = higher
    return peak, total, summed


@triton.jit(
    do_not_specialize=["requests", "programs"],
    do_not_specialize_on_alignment=["seq_lens", "maxima", "totals"],
)
def combine_kernel(
    sums, maxima, totals, seq_lens, out, requests, programs,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, QUERY_LEN: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, REQUESTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    group: tl.constexpr = HEADS // KV_HEADS
    request, head = tl.program_id(0), tl.program_id(1)
    ends = _block_ends(seq_lens, requests, REQUESTS, BLOCK)
    num_blocks = tl.max(ends, 0)
    begin = tl.max(tl.where(tl.arange(0, REQUESTS) < request, ends, 0), 0) + head * num_blocks
    end = begin + tl.cdiv(tl.load(seq_lens + request), BLOCK)
    shares = tl.minimum(programs, num_blocks * KV_HEADS)
    first = _share_of(begin, num_blocks * KV_HEADS, shares)
    last = _share_of(end - 1, num_blocks * KV_HEADS, shares)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, d = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
    inside = row < QUERY_LEN * group
    peak = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    summed = tl.zeros((ROWS, DIM), tl.float32)
    for program in range(first, last + 1, PARTS):
        index = tl.arange(0, PARTS)
        found = (program + index <= last)[:, None] & inside
        before = (program + head * requests + request).to(tl.int64) * QUERY_LEN * group
        of_part = index[:, None] * QUERY_LEN * group + row
        at_part = sums + before * DIM + of_part[:, :, None] * DIM + d
        part = tl.load(at_part, mask=found[:, :, None], other=0.0)
        more = tl.load(maxima + before + of_part, mask=found, other=float("-inf"))
        totalled = tl.load(totals + before + of_part, mask=found, other=0.0)
        higher = tl.maximum(peak, tl.max(more, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        kept, share = tl.exp2(peak - base), tl.exp2(more - base)
        total = total * kept + tl.sum(totalled * share, 0)
        summed = summed * kept[:, None] + tl.sum(part * share[:, :, None], 0)
        peak = higher
    total = tl.where(inside, total, 1.0)
    of_out = (request * QUERY_LEN + row // group) * HEADS + head * group + row % group
    at_out = out + of_out.to(tl.int64)[:, None] * DIM + d
    tl.store(at_out, (summed / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _block_ends(seq_lens, requests, REQUESTS: tl.constexpr, BLOCK: tl.constexpr):
    """Count the blocks of one head up to each request's end."""
    index = tl.arange(0, REQUESTS)
    lengths = tl.load(seq_lens + index, mask=index < requests, other=0)
    return tl.cumsum(tl.cdiv(lengths, BLOCK), 0)


@triton.jit
def _share_begin(program, total, shares):
    return (program.to(tl.int64) * total // shares).to(tl.int32)


@triton.jit
def _share_of(index, total, shares):
    """Find the last share that begins no later."""
    return (((index.to(tl.int64) + 1) * shares - 1) // total).to(tl.int32)
