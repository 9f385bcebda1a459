"""Launches of products of few rows."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_runtime.kernels.dense_linear.product import product_kernel
from dp_runtime.kernels.dense_linear.tiles import DenseTile
from dp_runtime.kernels.triton_launch import launch, overlaps


def multiply(x: Tensor, weight: Tensor, out: Tensor, counters: Tensor, tile: DenseTile) -> Tensor:
    """Compute x @ weight.T, to the same bits each time.

    x [rows, inputs] and out [rows, outputs], their rows contiguous; weight [outputs, inputs],
    contiguous; counters int32: zero, as they are left.
    """
    rows, (outputs, inputs) = len(x), weight.shape
    assert out.shape == (rows, outputs), f"{tuple(out.shape)} for {rows} rows of {outputs}"
    assert weight.is_contiguous(), "a matrix is contiguous"
    share, tiles = tile.share(inputs), tile.num_tiles(rows, outputs)
    assert (tile.split - 1) * share < inputs, f"{tile} has programs without inputs"
    assert tile.split == 1 or tiles <= len(counters), f"{tiles} tiles, {len(counters)} counters"
    if not rows:
        return out
    sums, size = None, tile.num_sums(rows, outputs)
    if size:
        sums = torch.empty(size, dtype=torch.float32, device=x.device)
    pdl = overlaps(x.device)
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "SPLIT": tile.split > 1, "EVEN": inputs == tile.split * share, "PDL": pdl,
    }  # fmt: skip
    launch(
        product_kernel,
        (tiles * tile.split, 1, 1),
        (
            x, weight, out, sums, counters,
            rows, outputs, inputs, x.stride(0), out.stride(0), share, tile.split,
        ),
        constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out
