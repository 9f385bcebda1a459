"""The largest entry of each row of a wide matrix in Triton; several programs share a row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
BLOCKS_AT_ONCE = 4  # a program goes through so many blocks of a row


def row_maxima(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return each row's maximum (NaN if there is one), its first column, and if it is finite."""
    rows, size = values.shape
    assert values.stride(1) == 1, "a row is in one piece"
    parts = triton.cdiv(size, BLOCK * BLOCKS_AT_ONCE)
    keys = torch.empty(rows, parts, dtype=torch.int64, device=values.device)
    if rows:
        _part_maxima[(rows, parts)](
            values, keys, size, values.stride(0), parts,
            BLOCK=BLOCK, BLOCKS=BLOCKS_AT_ONCE, num_warps=4,
        )  # fmt: skip
    return reduce_keys(keys)


def reduce_keys(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find each row's maximum, its column, and if it is finite, in the keys [n, parts] of parts."""
    rows, parts = keys.shape
    peaks = torch.empty(rows, dtype=torch.float32, device=keys.device)
    best = torch.empty(rows, dtype=torch.int64, device=keys.device)
    finite = torch.empty(rows, dtype=torch.bool, device=keys.device)
    if rows:
        _row_maxima[(rows,)](
            keys, peaks, best, finite, parts, PARTS=triton.next_power_of_2(parts), num_warps=1
        )
    return peaks, best, finite


@triton.jit
def _part_maxima(values, keys, size, stride, parts, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    lane = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    first = part * BLOCK * BLOCKS + lane
    for block in tl.static_range(BLOCKS):
        column = (part * BLOCKS + block) * BLOCK + lane
        inside = column < size
        value = tl.load(values + row * stride + column, mask=inside, other=float("-inf"))
        value = value.to(tl.float32)
        better = (value > peak) | (value != value)
        peak, first = tl.where(better, value, peak), tl.where(better, column, first)
    tl.store(keys + row * parts + part, tl.max(ordered_key(peak, first), 0))


@triton.jit
def ordered_key(peak, first):
    """Pack a maximum above its inverted column, so that the largest key is the first maximum."""
    bits = tl.where(peak == 0.0, 0, peak.to(tl.int32, bitcast=True))  # one zero
    bits = tl.where(peak != peak, 0x7FC00000, bits)  # one NaN, above all else
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as integers in the order of the floats
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - first).to(tl.int64)


@triton.jit
def _row_maxima(keys, peaks, best, finite, parts, PARTS: tl.constexpr):
    row, part = tl.program_id(0), tl.arange(0, PARTS)
    lowest = -0x7FFFFFFFFFFFFFFF
    key = tl.max(tl.load(keys + row * parts + part, mask=part < parts, other=lowest), 0)
    ordered = (key >> 32).to(tl.int32)
    peak = tl.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(tl.float32, bitcast=True)
    tl.store(peaks + row, peak)
    tl.store(best + row, 0x7FFFFFFF - (key & 0x7FFFFFFF))
    tl.store(finite + row, tl.abs(peak) < float("inf"))
