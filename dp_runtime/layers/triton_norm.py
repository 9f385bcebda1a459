"""RMSNorm in Triton: with the residual sum before it, and per head before a rotary embedding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def add_rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """Add x to `residual` in place, and return the RMSNorm of that sum, [rows, size].

    Without a residual the norm of x. Sums and squares are taken in float32; the sum and the
    quotient are rounded to x's dtype first, as the models were trained.
    """
    assert x.is_contiguous(), "rows lie one behind the other"
    out = torch.empty_like(x)
    rows, size = x.shape
    if rows:
        block = triton.next_power_of_2(size)
        _add_rms_norm_kernel[(rows,)](
            x, residual, weight, out, size, eps,
            HAS_RESIDUAL=residual is not None, BLOCK=block,
            num_warps=min(max(block // 512, 1), 8),
        )  # fmt: skip
    return out


def norm_and_rotate(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    weight: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every query and key head, then its halves rotated against each other.

    qkv [rows, num_heads + 2 * num_kv_heads, head_dim]; weight [num_heads + num_kv_heads,
    head_dim], or None for models without such a norm; cos, sin [rows, head_dim / 2]
    -> q [rows, num_heads, head_dim], k [rows, num_kv_heads, head_dim], both in one piece.
    """
    rows, _, head_dim = qkv.shape
    q = torch.empty(rows, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty(rows, num_kv_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    if rows:
        heads = num_heads + num_kv_heads
        block = 8
        _norm_and_rotate_kernel[(rows, triton.cdiv(heads, block))](
            qkv, q, k, weight, cos, sin, eps, qkv.stride(0), num_heads, heads,
            HEAD_DIM=head_dim, HALF=triton.next_power_of_2(head_dim // 2), HEADS=block,
            HAS_NORM=weight is not None, num_warps=2,
        )  # fmt: skip
    return q, k


@triton.jit
def _add_rms_norm_kernel(
    x, residual, weight, out, size, eps, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < size
    dtype = x.dtype.element_ty
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        value = value.to(dtype).to(tl.float32)
        tl.store(residual + at, value.to(dtype), mask=inside)
    quotient = value * tl.rsqrt(tl.sum(value * value, 0) / size + eps)
    scale = tl.load(weight + tl.arange(0, BLOCK), mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (quotient.to(dtype).to(tl.float32) * scale).to(dtype), mask=inside)


@triton.jit
def _norm_and_rotate_kernel(
    qkv, q, k, weight, cos, sin, eps, qkv_stride, num_heads, heads,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    dim = tl.arange(0, HALF)[None, :]
    half: tl.constexpr = HEAD_DIM // 2
    inside = (head < heads) & (dim < half)
    at = qkv + row * qkv_stride + head * HEAD_DIM + dim
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
    dtype = qkv.dtype.element_ty
    if HAS_NORM:
        squares = tl.sum(first * first + second * second, 1)[:, None]
        scale = tl.rsqrt(squares / HEAD_DIM + eps)
        w = weight + head * HEAD_DIM + dim
        first = (first * scale).to(dtype) * tl.load(w, mask=inside, other=0.0)
        second = (second * scale).to(dtype) * tl.load(w + half, mask=inside, other=0.0)
        first, second = first.to(tl.float32), second.to(tl.float32)
    angle = row * half + dim
    c = tl.load(cos + angle, mask=dim < half, other=0.0).to(tl.float32)
    s = tl.load(sin + angle, mask=dim < half, other=0.0).to(tl.float32)
    low, high = (first * c - second * s).to(dtype), (second * c + first * s).to(dtype)
    q_at = q + (row * num_heads + head) * HEAD_DIM + dim
    is_q = inside & (head < num_heads)
    tl.store(q_at, low, mask=is_q)
    tl.store(q_at + half, high, mask=is_q)
    k_at = k + (row * (heads - num_heads) + head - num_heads) * HEAD_DIM + dim
    is_k = inside & (head >= num_heads)
    tl.store(k_at, low, mask=is_k)
    tl.store(k_at + half, high, mask=is_k)
