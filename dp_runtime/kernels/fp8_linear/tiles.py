"""Tile sizes of the products with e4m3 matrices: the best ones of dense_fp8.py on an H200."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from dp_runtime.weights.fp8_blocks import num_blocks

GROUP = 16  # inputs that are interleaved with each other
NUM_COUNTERS = 4096  # tiles that programs may share
MULTIPROCESSORS = 132  # of an H200
LARGE = 1 << 24  # weights of a matrix that takes long to widen
WIDE = 96 * 128  # outputs, enough for tiles of 128 if few rows come
TILES = (  # up to so many rows (measured: 1, 8, 32, 64, 128, 512): block_m, stages, least programs
    (16, 16, 4, 2 * MULTIPROCESSORS),
    (32, 32, 4, 2 * MULTIPROCESSORS),
    (128, 64, 3, 2 * MULTIPROCESSORS),
    (384, 128, 3, MULTIPROCESSORS),  # one fits on each
)


def interleave(weight: Tensor) -> Tensor:
    """Order each 16 inputs of [outputs, inputs] as `expert_products.regroup` takes them back.

    So the four that a thread of a product takes lie side by side.
    """
    outputs, inputs = weight.shape
    groups = weight.view(outputs, inputs // GROUP, 2, 4, 2)
    return groups.transpose(2, 3).reshape(outputs, inputs)


@dataclass(frozen=True)
class LinearTile:
    """The tiling: block_m rows by block_n outputs, the inputs split over programs."""

    block_m: int
    block_n: int
    block_k: int  # divides the 128 inputs of a scale
    split: int  # programs that share a tile, each with its part of the inputs
    num_warps: int
    num_stages: int
    swap: bool = True  # weights are the product's first operand: its 64 rows at least are outputs
    tma: bool = False  # the copy engine reads weights, from capability 9.0 on


def widened_from(outputs: int, inputs: int) -> int:
    """Give the rows from which on a widened copy and cuBLAS are taken to be faster.

    Between 128 and 512 rows by a straight line: from about 130 on for small, 270 to 600 for large.
    """
    return 385 if outputs * inputs >= LARGE else 129


def choose_tile(rows: int, outputs: int, inputs: int) -> LinearTile | None:
    """Choose what was best over all matrices; None: multiply with a widened copy."""
    if rows >= widened_from(outputs, inputs):
        return None
    block_m, stages, programs = next(tile for most, *tile in TILES if rows <= most)
    block_n = 128 if block_m == 16 and outputs >= WIDE else 64
    split = fit_split(rows, outputs, inputs, block_m, block_n, programs)
    return LinearTile(block_m, block_n, 128, split, 4, stages, tma=True)


def fit_split(
    rows: int, outputs: int, inputs: int, block_m: int, block_n: int, programs: int
) -> int:
    """Choose the least split with so many programs that leaves none without inputs, up to 8."""
    tiles = -(-rows // block_m) * -(-outputs // block_n)
    return whole_split(inputs, min(8, -(-programs // tiles)))


def whole_split(inputs: int, split: int) -> int:
    """Lower a split until each of its programs has a block of inputs, and all but one as many."""
    blocks = num_blocks(inputs)
    return -(-blocks // -(-blocks // min(split, blocks)))


@cache
def product_bytes(rows: int, outputs: int, inputs: int) -> int:
    """Count the most bytes that products of up to so many rows allocate beside their results."""
    sums, widened = 0, widened_from(outputs, inputs)
    for count in range(1, min(rows + 1, widened)):
        tile = choose_tile(count, outputs, inputs)
        if tile is not None and tile.split > 1:
            sums = max(sums, tile.split * count * outputs * 4)
    return max(sums, outputs * inputs * 2 if rows >= widened else 0)
