"""The inverse of a unit lower triangular matrix, within one program."""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = tl.constexpr(16)


@triton.jit
def inverse(lower, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Invert 1 + lower, [SIZE, SIZE] float32 and zero but below its diagonal; SIZE is 64.

    Where X inverts blocks on the diagonal and C lies between two of them, X - X C X inverts blocks
    of twice the size. These are parts of the result: nothing grows, as powers of `lower` would.
    """
    tl.static_assert(SIZE == 4 * BLOCK)
    at = tl.arange(0, SIZE)
    is_same = at[:, None] // BLOCK == at[None, :] // BLOCK
    blocks = tl.reshape(tl.where(is_same, lower, 0.0), [4, BLOCK, 4, BLOCK])
    solved = _invert_blocks(tl.sum(blocks, 2), PRECISION)  # [block, row, column]
    whole = tl.broadcast_to(solved[:, :, None, :], [4, BLOCK, 4, BLOCK])
    whole = tl.where(is_same, tl.reshape(whole, [SIZE, SIZE]), 0.0)
    row, column = at[:, None], at[None, :]
    whole = _join(whole, lower, row, column, BLOCK, PRECISION)
    return _join(whole, lower, row, column, 2 * BLOCK, PRECISION)


@triton.jit
def _invert_blocks(lower, PRECISION: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[None, :, None], tl.arange(0, BLOCK)[None, None, :]
    solved = tl.where(row == column, 1.0, 0.0) - tl.where(row // 2 == column // 2, lower, 0.0)
    solved = _join(solved, lower, row, column, 2, PRECISION)
    solved = _join(solved, lower, row, column, 4, PRECISION)
    return _join(solved, lower, row, column, 8, PRECISION)


@triton.jit
def _join(solved, lower, row, column, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    """Take inverses of the blocks of SIZE on the diagonal to those of twice that size."""
    is_between = (row // (2 * SIZE) == column // (2 * SIZE)) & (row // SIZE != column // SIZE)
    between = tl.where(is_between, lower, 0.0)
    read = tl.dot(solved, between, input_precision=PRECISION)
    return solved - tl.dot(read, solved, input_precision=PRECISION)
