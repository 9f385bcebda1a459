"""Launches of the products with e4m3 matrices."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dp_runtime.kernels.fp8_linear.product import product_kernel, widen_kernel
from dp_runtime.kernels.fp8_linear.tiles import LinearTile, whole_split
from dp_runtime.kernels.triton_launch import overlaps
from dp_runtime.weights.fp8_blocks import BLOCK

WIDENED_ROWS = 32  # of a matrix, by one program


def multiply(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    out: Tensor,
    counters: Tensor,
    tile: LinearTile,
) -> Tensor:
    """Compute x @ (weight * scales).T, in the dtype of x.

    x [rows, inputs] and out [rows, outputs], their rows contiguous; weight [outputs, inputs] e4m3,
    interleaved, scales [blocks of inputs, outputs] float32, both contiguous; counters int32,
    `NUM_COUNTERS`: zero, as they are left.
    """
    rows, (outputs, inputs) = len(x), weight.shape
    assert out.shape == (rows, outputs), f"{tuple(out.shape)} for {rows} rows of {outputs}"
    assert weight.is_contiguous(), "a matrix is contiguous"
    assert scales.is_contiguous(), "scales are contiguous"
    assert BLOCK % tile.block_k == 0, f"{tile} crosses scales"
    assert tile.split == whole_split(inputs, tile.split), f"{tile} has programs without inputs"
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(outputs, tile.block_n)
    assert tile.split == 1 or tiles <= len(counters), f"{tiles} tiles, {len(counters)} counters"
    sums, pdl = None, overlaps(x.device)
    if tile.split > 1:
        sums = torch.empty(tile.split, rows, outputs, dtype=torch.float32, device=x.device)
    blocks = None
    if tile.tma:
        shape = [tile.block_n, tile.block_k]
        blocks = TensorDescriptor(weight, [outputs, inputs], [inputs, 1], shape)
    product_kernel[(tiles * tile.split,)](
        x, weight, blocks, scales, out, sums, counters,
        rows, outputs, inputs, x.stride(0), out.stride(0), tile.split,
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
        SPLIT=tile.split > 1, SWAP=tile.swap, EVEN=inputs % tile.block_k == 0, PDL=pdl,
        num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=pdl,
    )  # fmt: skip
    return out


def widened(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply a matrix by its scales into a new one; rounded as `dequantize` would be."""
    (outputs, inputs), pdl = weight.shape, overlaps(weight.device)
    out = torch.empty(outputs, inputs, dtype=dtype, device=weight.device)
    grid = triton.cdiv(outputs, WIDENED_ROWS), triton.cdiv(inputs, BLOCK)
    widen_kernel[grid](
        weight, scales, out, outputs, inputs,
        BLOCK_N=WIDENED_ROWS, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out
