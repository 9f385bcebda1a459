"""Triton kernels that write new keys and values into a paged pool, also with norm and rotation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dp_runtime.core.qk_norm_rope import QkNormRope
from dp_runtime.kernels.triton_launch import gdc_launch_dependents, gdc_wait, overlaps

HEADS_AT_ONCE = 8  # heads of a row that one program takes


def append_rows(pool: Tensor, slot_mapping: Tensor, k: Tensor, v: Tensor) -> None:
    """Write k and v [rows, num_kv_heads, head_dim] to their slots of a pool of the same dtype."""
    rows, kv_heads, head_dim = k.shape
    assert k.stride()[1:] == v.stride()[1:] == (head_dim, 1), "a row's heads are in one piece"
    _append_kernel[(rows,)](
        pool, slot_mapping, k, v, k.stride(0), v.stride(0), pool.shape[3],
        KV_HEADS=kv_heads, HEADS=triton.next_power_of_2(kv_heads), HEAD_DIM=head_dim,
        DIMS=triton.next_power_of_2(head_dim), num_warps=4,
    )  # fmt: skip


def rotate_and_append(
    pool: Tensor,  # [num_pages, 2, num_kv_heads, page_size, head_dim]
    slot_mapping: Tensor,  # [rows] page * page_size + offset
    qkv: Tensor,
    rotation: QkNormRope,
    k_scale: float,
    v_scale: float,
    out: Tensor | None = None,
) -> Tensor:
    """Norm and rotate query and key heads, write keys and values, and return the queries.

    qkv [rows, num_heads + 2 * num_kv_heads, head_dim] -> q [rows, num_heads, head_dim], `out` or a
    new tensor. What has a negative slot is written nowhere. Norm and
    rotation are float32, each rounded to qkv's dtype, as the models were trained. An e4m3 pool
    comes as bytes (uint8); a value is divided by its scale and clamped to +-448.
    """
    rows, all_heads, head_dim = qkv.shape
    kv_heads, page_size = pool.shape[2:4]
    num_heads = all_heads - 2 * kv_heads
    weight, cos, sin = rotation.norm_weight, rotation.cos, rotation.sin
    assert qkv.stride()[1:] == (head_dim, 1), "a row's heads are in one piece"
    together = [x for x in (pool, weight, cos, sin) if x is not None]
    assert all(x.is_contiguous() for x in together), "the pool, weights and angles are contiguous"
    shape = (rows, num_heads, head_dim)
    q = qkv.new_empty(shape) if out is None else out
    assert (q.shape, q.dtype) == (shape, qkv.dtype), f"{q.shape}, {q.dtype} for {shape} queries"
    assert q.is_contiguous(), "queries are written in one piece"
    pdl = overlaps(qkv.device)
    _rotate_and_append_kernel[(rows, triton.cdiv(all_heads, HEADS_AT_ONCE))](
        qkv, q, pool, slot_mapping, weight, cos, sin, rotation.eps, k_scale, v_scale,
        qkv.stride(0), num_heads, kv_heads, page_size,
        HEAD_DIM=head_dim, HALF=triton.next_power_of_2(head_dim // 2), HEADS=HEADS_AT_ONCE,
        HAS_NORM=weight is not None, QUANTIZED=pool.dtype == torch.uint8,
        PDL=pdl, num_warps=2, launch_pdl=pdl,
    )  # fmt: skip
    return q


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


@triton.jit
def _rotate_and_append_kernel(
    qkv, q, pool, slot_mapping, weight, cos, sin, eps, k_scale, v_scale,
    qkv_stride, num_heads, kv_heads, page_size,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
    QUANTIZED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:  # XQA, the next kernel, starts early too: it waits before it reads q or a new key
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + row).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    dim = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = HEAD_DIM // 2
    dtype = qkv.dtype.element_ty
    plane = head - num_heads  # of the page: its keys by head, then its values
    inside = (plane < 2 * kv_heads) & (dim < half)
    rotated = (plane < kv_heads) & (dim < half)
    at = qkv + row * qkv_stride + head * HEAD_DIM + dim
    first = tl.load(at, mask=inside, other=0.0)
    second = tl.load(at + half, mask=inside, other=0.0)
    x, y = first.to(tl.float32), second.to(tl.float32)
    if HAS_NORM:
        scale = tl.rsqrt(tl.sum(x * x + y * y, 1)[:, None] / HEAD_DIM + eps)
        w = weight + head * HEAD_DIM + dim
        low_gain = tl.load(w, mask=rotated, other=0.0)
        high_gain = tl.load(w + half, mask=rotated, other=0.0)
        x = ((x * scale).to(low_gain.dtype) * low_gain).to(dtype).to(tl.float32)
        y = ((y * scale).to(low_gain.dtype) * high_gain).to(dtype).to(tl.float32)
    angle = row * half + dim
    c = tl.load(cos + angle, mask=dim < half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=dim < half, other=0.0).to(tl.float32)
    low = tl.where(rotated, (x * c - y * s).to(dtype), first)
    high = tl.where(rotated, (y * c + x * s).to(dtype), second)
    into = q + (row * num_heads + head) * HEAD_DIM + dim
    is_q = rotated & (plane < 0)
    tl.store(into, low, mask=is_q)
    tl.store(into + half, high, mask=is_q)
    page, offset = slot // page_size, slot % page_size
    into = pool + ((page * 2 * kv_heads + plane) * page_size + offset) * HEAD_DIM + dim
    is_kv = inside & (tl.where(plane >= 0, slot, -1) >= 0)
    if QUANTIZED:
        unit = tl.where(plane < kv_heads, k_scale, v_scale)
        tl.store(into, _e4m3(tl.div_rn(low.to(tl.float32), unit)), mask=is_kv)
        tl.store(into + half, _e4m3(tl.div_rn(high.to(tl.float32), unit)), mask=is_kv)
    else:
        tl.store(into, low, mask=is_kv)
        tl.store(into + half, high, mask=is_kv)


@triton.jit
def _e4m3(x):
    """Round float32 to float8_e4m3fn bits in integers: GPUs before SM89 have no such conversion."""
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    value = tl.minimum(size, 0x43E00000)  # to 448; ties go to even; NaN stays NaN
    normal = ((value + 0x7FFFF + ((value >> 20) & 1)) >> 20) - (120 << 3)  # 3 bits, bias 7 for 127
    # Below 2^-6 values are multiples of 2^-9, and those are all that float32 has from 2^14 on
    small = (value.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    rounded = tl.where(value < 0x3C800000, small, normal)
    return (tl.where(size > 0x7F800000, 0x7F, rounded) | sign).to(tl.uint8)
