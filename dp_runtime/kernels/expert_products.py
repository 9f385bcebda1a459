"""A product of pairs and an expert's weights in Triton; e4m3 is widened, which is exact."""

from __future__ import annotations

import triton
import triton.language as tl

from dp_runtime.weights.fp8_blocks import BLOCK

SCALE_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def scales_of(matrix, row, rows, WIDTH: tl.constexpr):
    """Find where the scales of a row's blocks begin, in stacked matrices of `rows` rows."""
    block_row = matrix * tl.cdiv(rows, SCALE_BLOCK) + row // SCALE_BLOCK
    return block_row * tl.cdiv(WIDTH, SCALE_BLOCK)


@triton.jit
def zeros(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr):
    if SWAP:
        return tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:  # noqa: RET505 - the branch is chosen while compiling
        return tl.zeros((BLOCK_M, BLOCK_N), tl.float32)


@triton.jit
def operand(rows, factor, REGROUP: tl.constexpr):
    """Make rows the operand that goes with widened weights: as they are, or times factor in f16."""
    if REGROUP:
        rows = regroup(rows)
    if factor is not None:
        rows = (rows * factor).to(tl.float16)
    return rows


@triton.jit
def powers_near(peaks):
    """Find powers of two that bring peaks near 2^14, and their inverses; infinite ones stay so."""
    exponents = tl.maximum(peaks.to(tl.int32, bitcast=True) >> 23, 27)
    powers = ((127 + 127 + 14 - exponents) << 23).to(tl.float32, bitcast=True)
    return powers, ((exponents - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def add_product(a, weights, total, scales, at, SWAP: tl.constexpr, REGROUP: tl.constexpr):
    if scales is None:
        return _product(a, weights, total, SWAP)
    else:  # noqa: RET505 - the branch is chosen while compiling
        scale = tl.load(scales + at)
        if REGROUP:
            weights = regroup(weights)
        return total + _product(a, widen(weights, a.dtype), None, SWAP) * scale


@triton.jit
def regroup(matrix):
    """Order 16 columns so that 2t, 2t + 1, 2t + 8 and 2t + 9, a thread's, lie side by side."""
    ROWS: tl.constexpr = matrix.shape[0]
    COLUMNS: tl.constexpr = matrix.shape[1]
    parts = matrix.reshape(ROWS, COLUMNS // 16, 4, 2, 2)
    return parts.permute(0, 1, 3, 2, 4).reshape(ROWS, COLUMNS)


@triton.jit
def _product(a, weights, total, SWAP: tl.constexpr):
    """Add a @ weights.T to total; swapped, all of it is transposed."""
    if SWAP:
        return tl.dot(weights, a.T, total, input_precision="ieee")
    else:  # noqa: RET505 - the branch is chosen while compiling
        return tl.dot(a, weights.T, total, input_precision="ieee")


@triton.jit
def widen(weights, DTYPE: tl.constexpr):
    """Convert e4m3 exactly, but NaN to bf16 becomes 480; the GPU's own way to bf16 is too slow.

    Integer operations move bits s eeee mmm to s 0000eeee mmm0000, which is 2^-120 of the value.
    """
    if tl.bfloat16 == DTYPE:
        return _widen_to_bf16(weights)
    else:  # noqa: RET505 - the branch is chosen while compiling
        return weights.to(DTYPE)


@triton.jit
def _widen_to_bf16(weights):
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 high, low, first, second, factor;
        mov.b32 factor, 0x7b807b80;
        shr.b32 high, $2, 4;
        and.b32 high, high, 0x07070707;
        lop3.b32 high, $2, 0x80808080, high, 0xea;
        shl.b32 low, $2, 4;
        and.b32 low, low, 0xf0f0f0f0;
        prmt.b32 first, low, high, 0x5140;
        prmt.b32 second, low, high, 0x7362;
        mul.rn.bf16x2 $0, first, factor;
        mul.rn.bf16x2 $1, second, factor;
        }
        """,
        "=r,=r,r", [weights], dtype=tl.bfloat16, is_pure=True, pack=4,
    )  # fmt: skip
