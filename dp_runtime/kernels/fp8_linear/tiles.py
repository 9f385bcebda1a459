"""Tile sizes of the products with e4m3 matrices, by the number of rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from torch import Tensor

from dp_runtime.weights.fp8_blocks import num_blocks

GROUP = 16  # inputs that are interleaved with each other
WIDENED_FROM = 1025  # rows: from here on a widened copy and cuBLAS are taken to be faster
NUM_COUNTERS = 4096  # tiles that programs may share
PROGRAMS = 264  # at least, if there are enough blocks: two for each multiprocessor of an H200


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


def choose_tile(rows: int, outputs: int, inputs: int) -> LinearTile | None:
    """Choose a tile, not measured on a GPU yet; None: multiply with a widened copy.

    examples/benchmarks/dense_fp8.py finds better ones.
    """
    if rows >= WIDENED_FROM:
        return None
    if rows <= 64:
        block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
        split = fit_split(rows, outputs, inputs, block_m, 64)
        return LinearTile(block_m, 64, 128, split, 4, 5 if block_m == 64 else 6)
    split = fit_split(rows, outputs, inputs, 128, 128, PROGRAMS // 2)
    return LinearTile(128, 128, 128, split, 8, 3)


def fit_split(
    rows: int, outputs: int, inputs: int, block_m: int, block_n: int, programs: int = PROGRAMS
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
    sums = 0
    for count in range(1, min(rows + 1, WIDENED_FROM)):
        tile = choose_tile(count, outputs, inputs)
        if tile is not None and tile.split > 1:
            sums = max(sums, tile.split * count * outputs * 4)
    return max(sums, outputs * inputs * 2 if rows >= WIDENED_FROM else 0)
