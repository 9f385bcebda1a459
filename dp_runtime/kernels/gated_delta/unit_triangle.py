"""The inverse of a unit lower triangular matrix, within one program."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)


@triton.jit
def inverse(lower, SIZE: tl.constexpr):
    """Invert 1 + lower, [SIZE, SIZE] float32 and zero but below its diagonal; SIZE is 64.

    NOTE: powers of `lower` grow like binomials where keys repeat, so that a series of the whole
    loses all digits. Blocks of 16 on the diagonal are solved row by row; the series over what is
    left, 4 blocks wide, ends after its third power.
    """
    tl.static_assert(SIZE == 4 * BLOCK)
    at = tl.arange(0, SIZE)
    is_same = at[:, None] // BLOCK == at[None, :] // BLOCK
    blocks = tl.reshape(tl.where(is_same, lower, 0.0), [4, BLOCK, 4, BLOCK])
    solved = _solve(tl.sum(blocks, 2))  # [block, row, column]
    own = tl.reshape(tl.broadcast_to(solved[:, :, None, :], [4, BLOCK, 4, BLOCK]), [SIZE, SIZE])
    own = tl.where(is_same, own, 0.0)
    rest = tl.dot(own, tl.where(is_same, 0.0, lower), input_precision="tf32x3")
    square = tl.dot(rest, rest, input_precision="tf32x3")
    own += tl.dot(square, own, input_precision="tf32x3")
    return own - tl.dot(rest, own, input_precision="tf32x3")


@triton.jit
def _solve(lower):
    """Invert 1 + lower for each block [4, 16, 16] by forward substitution."""
    row, column = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    solved = tl.where(row == column, 1.0, 0.0) + lower * 0.0
    for i in range(1, BLOCK):
        factors = tl.sum(tl.where(row == i, lower, 0.0), 1)  # [4, 16], of the rows before
        change = tl.sum(factors[:, :, None] * solved, 1)
        solved -= tl.where(row == i, change[:, None, :], 0.0)
    return solved
