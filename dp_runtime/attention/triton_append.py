"""Writing new keys and values into a paged pool with one Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def append_rows(pool: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
    """k and v [rows, num_kv_heads, head_dim] go to slots [rows] (page * page_size + offset).

    pool [num_pages, 2, num_kv_heads, page_size, head_dim], in the same dtype; heads of k and v lie
    one behind the other, their rows need not.
    """
    rows, kv_heads, head_dim = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1), "a row's heads are in one piece"
    _append_kernel[(rows,)](
        pool, slot_mapping, k, v, k.stride(0), v.stride(0), pool.shape[3],
        KV_HEADS=kv_heads, HEADS=triton.next_power_of_2(kv_heads), HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip


@triton.jit
def _append_kernel(
    pool, slot_mapping, k, v, k_stride, v_stride, page_size,
    KV_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    page, offset = slot // page_size, slot % page_size
    head, dim = tl.arange(0, HEADS)[:, None], tl.arange(0, DIMS)[None, :]
    inside = (head < KV_HEADS) & (dim < HEAD_DIM)
    source = head * HEAD_DIM + dim
    into = pool + ((page * 2 * KV_HEADS + head) * page_size + offset) * HEAD_DIM + dim
    tl.store(into, tl.load(k + row * k_stride + source, mask=inside), mask=inside)
    into += KV_HEADS * page_size * HEAD_DIM
    tl.store(into, tl.load(v + row * v_stride + source, mask=inside), mask=inside)
