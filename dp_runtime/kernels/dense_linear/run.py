"""Launches of products of few rows."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dp_runtime.kernels.dense_linear.product import product_kernel
from dp_runtime.kernels.dense_linear.tiles import DenseTile
from dp_runtime.kernels.triton_launch import launch, overlaps

ALIGNED = 16  # bytes from which on the L2 fetches


def multiply(x: Tensor, weight: Tensor, out: Tensor, counters: Tensor, tile: DenseTile) -> Tensor:
    """Compute x @ weight.T, to the same bits each time.

    x [rows, inputs] and out [rows, outputs], their rows contiguous; weight [outputs, inputs],
    contiguous, each row a multiple of 16 bytes; counters int32: zero, as they are left.
    """
    rows, (outputs, inputs) = len(x), weight.shape
    assert out.shape == (rows, outputs), f"{tuple(out.shape)} for {rows} rows of {outputs}"
    assert weight.is_contiguous(), "a matrix is contiguous"
    assert inputs * weight.itemsize % ALIGNED == 0, f"{inputs} inputs"
    share, tiles = tile.share(inputs), tile.num_tiles(rows, outputs)
    assert (tile.split - 1) * share < inputs, f"{tile} has programs without inputs"
    assert tile.split == 1 or tiles <= len(counters), f"{tiles} tiles, {len(counters)} counters"
    if not rows:
        return out
    sums, size = None, tile.num_sums(rows, outputs)
    if size:
        sums = torch.empty(size, dtype=torch.float32, device=x.device)
    loops, pdl = share > tile.held, overlaps(x.device)
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        "HELD": tile.held, "SPLIT": tile.split > 1, "LOOP": loops,
        "EVEN": inputs == tile.split * share, "AHEAD": tile.ahead,
        "LATE": tile.late, "PDL": pdl,
    }  # fmt: skip
    launch(
        product_kernel,
        (tiles * tile.split, 1, 1),
        (
            x, weight, _blocks(weight, tile, tile.block_k * loops),
            _blocks(weight, tile, tile.held), out, sums, counters,
            rows, outputs, inputs, x.stride(0), out.stride(0), share, tile.split,
        ),
        constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _blocks(weight: Tensor, tile: DenseTile, width: int) -> TensorDescriptor | None:
    """Describe blocks of a matrix to the copy engine; None: plain loads."""
    if not tile.tma or not width:
        return None
    outputs, inputs = weight.shape
    return TensorDescriptor(weight, [outputs, inputs], [inputs, 1], [tile.block_n, width])
