"""The experts run over their pairs: two products in Triton, and the sum of each row's pairs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dp_runtime.kernels.expert_kernels import down_kernel, gate_up_kernel, sum_kernel
from dp_runtime.kernels.expert_tiles import ExpertTiles, Tile
from dp_runtime.kernels.moe_router import Routing
from dp_runtime.kernels.triton_launch import num_multiprocessors, overlaps
from dp_runtime.weights.fp8_blocks import BLOCK, ExpertScales


@dataclass(frozen=True, eq=False)
class Activated:
    """What gate-up gives: by pair if its tile is by expert, else one expert's after another."""

    values: Tensor  # [n * k, intermediate]
    peaks: Tensor | None  # [n * k, blocks of columns] float32: of |values|, for an f16 down


def run_experts(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing: Routing,
    tiles: ExpertTiles,
    scales: ExpertScales | None = None,
) -> Tensor:
    """Sum weight * down(silu(gate(row)) * up(row)) over the local experts that a row chose.

    rows [n, hidden]; gate_up [local, 2 * intermediate, hidden]; down [local, hidden, intermediate],
    both contiguous, in the dtype of rows or e4m3 with scales -> [n, hidden].
    """
    if len(down) == 0:
        weighted = rows.new_empty(routing.local_ids.numel(), rows.shape[1])
    else:
        assert tiles.gate_up.by_expert == tiles.down.by_expert, f"one order of pairs: {tiles}"
        of_gate_up, of_down = (None, None) if scales is None else (scales.gate_up, scales.down)
        with_peaks = tiles.down.f16
        activated = gate_up_pairs(rows, gate_up, routing, tiles.gate_up, of_gate_up, with_peaks)
        weighted = down_pairs(activated, down, routing, tiles.down, of_down)
    return sum_pairs(weighted, routing.local_ids)


def gate_up_pairs(
    rows: Tensor,
    gate_up: Tensor,
    routing: Routing,
    tile: Tile,
    scales: Tensor | None = None,
    with_peaks: bool = False,
) -> Activated:
    """Compute silu(gate(row)) * up(row) of local pairs.

    An f16 tile reads bf16 as an eighth in f16: exactly from 2^-14 up to 2^19, far beyond any normed
    row; below to within 2^-22, above as infinite, which its request's logits show and it ends.
    """
    num_local, both, hidden = gate_up.shape
    n, top_k = routing.local_ids.shape
    intermediate, pairs = both // 2, n * top_k
    activated, peaks = rows.new_empty(pairs, intermediate), None
    if with_peaks:
        assert intermediate % tile.block_n == 0, f"{tile} has peaks of whole blocks only"
        blocks = intermediate // tile.block_n
        peaks = torch.empty(pairs, blocks, dtype=torch.float32, device=rows.device)
    pdl = overlaps(rows.device)
    _check_scales(gate_up, scales, tile)
    gate_up_kernel[_grid(rows, num_local, pairs, intermediate, tile)](
        rows, gate_up, _gate_up_by_tma(gate_up, tile), scales,
        activated, peaks, routing.counts, routing.pairs, n, num_local, rows.stride(0), intermediate,
        HIDDEN=hidden, TOP_K=top_k, LOCAL=triton.next_power_of_2(num_local),
        PDL=pdl, launch_pdl=pdl, **_options(tile, rows.dtype),
    )  # fmt: skip
    return Activated(activated, peaks)


def down_pairs(
    activated: Activated, down: Tensor, routing: Routing, tile: Tile, scales: Tensor | None = None
) -> Tensor:
    """Compute weight * down(row) from the result of `gate_up_pairs`: [n * k, hidden] by pair.

    An f16 tile brings each row's peak near 2^14: f16 holds bf16 exactly down to 2^-31 of it.
    """
    num_local, hidden, intermediate = down.shape
    values, peaks = activated.values, activated.peaks
    assert not tile.f16 or peaks is not None, "rows in f16 are scaled by their peaks"
    pairs = len(values)
    weighted = values.new_empty(pairs, hidden)
    pdl = overlaps(down.device)
    _check_scales(down, scales, tile)
    down_kernel[_grid(values, num_local, pairs, hidden, tile)](
        values,
        None if tile.by_expert else _by_tma(values, pairs, intermediate, tile.block_m, tile), peaks,
        down, _by_tma(down, num_local * hidden, intermediate, tile.block_n, tile), scales,
        routing.weights, weighted, routing.counts, routing.pairs, len(routing.local_ids),
        num_local, hidden, INTERMEDIATE=intermediate, PEAKS=0 if peaks is None else peaks.shape[1],
        LOCAL=triton.next_power_of_2(num_local),
        PDL=pdl, launch_pdl=pdl, **_options(tile, values.dtype),
    )  # fmt: skip
    return weighted


def sum_pairs(weighted: Tensor, local_ids: Tensor) -> Tensor:
    """Sum each row's local pairs (id >= 0) in float32 in the order of its experts: [n, hidden]."""
    rows, top_k = local_ids.shape
    hidden = weighted.shape[1]
    out = weighted.new_empty(rows, hidden)
    block, pdl = 1024, overlaps(weighted.device)
    sum_kernel[(rows, triton.cdiv(hidden, block))](
        weighted, local_ids, out, hidden,
        TOP_K=top_k, BLOCK=block, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return out


def _grid(rows: Tensor, num_local: int, pairs: int, columns: int, tile: Tile) -> tuple[int]:
    if tile.per_multiprocessor is None:
        return (num_local * triton.cdiv(columns, tile.block_n),)
    row_blocks = min(pairs, num_local + pairs // tile.block_m)
    max_programs = num_multiprocessors(rows.device) * tile.per_multiprocessor
    return (min(row_blocks * triton.cdiv(columns, tile.block_n), max_programs),)


def _check_scales(weights: Tensor, scales: Tensor | None, tile: Tile) -> None:
    assert (scales is not None) == (weights.dtype.itemsize == 1), "e4m3 weights have scales"
    plain = not tile.regroup and not tile.f16
    assert scales is not None or plain, f"only e4m3 weights are regrouped or widened: {tile}"
    assert scales is None or not tile.joint, f"gate and up have scales of their own: {tile}"
    if scales is not None:
        assert BLOCK % tile.block_n == BLOCK % tile.block_k == 0, f"{tile} crosses scales"
        assert scales.is_contiguous(), "scales are contiguous"


def _by_tma(
    matrix: Tensor, rows: int, columns: int, block: int, tile: Tile
) -> TensorDescriptor | None:
    if not tile.tma:
        return None
    return TensorDescriptor(matrix, [rows, columns], [columns, 1], [block, tile.block_k])


def _gate_up_by_tma(gate_up: Tensor, tile: Tile) -> TensorDescriptor | None:
    num_local, both, hidden = gate_up.shape
    if not tile.joint:
        return _by_tma(gate_up, num_local * both, hidden, tile.block_n, tile)
    assert tile.tma, f"only the copy engine reads both: {tile}"
    shape, strides = [num_local * 2, both // 2, hidden], [both // 2 * hidden, hidden, 1]
    return TensorDescriptor(gate_up, shape, strides, [2, tile.block_n, tile.block_k])


def _options(tile: Tile, dtype: torch.dtype) -> dict[str, int | str]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "BY_EXPERT": tile.by_expert,
        "SWAP": tile.swap,
        "REGROUP": tile.regroup,
        "F16": tile.f16 and dtype != torch.float16,  # those are used as they are
        "REST": tile.rest,
        "JOINT": tile.joint,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
