"""The experts' Triton kernels over e4m3 weights in the interpreter, and the range of their rows.

The interpreter has no bfloat16 products; float32 and float16 show the same code paths.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.expert_tiles import E4M3_TILES, ExpertTiles, Tile
from dp_runtime.kernels.experts import Activated, down_pairs, gate_up_pairs, run_experts
from dp_runtime.kernels.moe_router import Routing
from dp_runtime.layers.experts import fused_experts
from dp_runtime.weights.fp8_blocks import ExpertScales, dequantize
from tests.dp_runtime.kernels.test_experts import DEVICE, TOLERANCE, draw, routed, row_ranges


@pytest.mark.parametrize(
    ("block_n", "block_k", "tma", "per_multiprocessor", "dtype", "swap", "regroup", "f16"),
    [
        (64, 128, False, None, torch.float32, True, True, False),
        (128, 64, True, None, torch.float16, False, False, False),
        (128, 128, True, 2, torch.float32, False, False, True),
        (64, 64, False, 2, torch.float16, True, False, False),
        (64, 64, True, 2, torch.float16, True, True, True),
    ],
)
def test_e4m3_experts_equal_widened_ones(
    block_n: int,
    block_k: int,
    tma: bool,
    per_multiprocessor: int | None,
    dtype: torch.dtype,
    swap: bool,
    regroup: bool,
    f16: bool,
) -> None:
    """Each block has a scale far from its neighbours'."""
    torch.manual_seed(2)
    hidden, intermediate, local, first = 384, 256, 2, 1
    stacked = [quantized(local * 2, intermediate, hidden), quantized(local, hidden, intermediate)]
    (gate_up, gate_up_scales, wide_gate_up), (down, down_scales, wide_down) = stacked
    rows = draw(9, hidden, dtype=dtype)
    routing = routed(draw(9, 5, dtype=torch.float32), row_ranges([0], [9]), 2, True, first, local)
    tile = Tile(16, block_n, block_k, 4, 2, tma, per_multiprocessor, swap, regroup, f16)
    out = run_experts(
        rows,
        gate_up.view(local, 2 * intermediate, hidden),
        down,
        routing,
        ExpertTiles(tile, tile),
        ExpertScales(gate_up_scales.view(local, 2 * 2, 3), down_scales),
    )
    ids = torch.where(routing.local_ids < 0, 5, routing.local_ids + first).long()
    due = fused_experts(
        rows.float(), wide_gate_up.view(local, -1, hidden), wide_down, ids, routing.weights, first
    )
    assert due.norm() > 1
    allowed = 5e-3 if f16 else TOLERANCE[dtype]  # rows have 11 bits
    assert (out.float() - due).norm() / due.norm() < allowed


def quantized(count: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked e4m3 matrices, their scales, and what they stand for in float32."""
    scales = torch.rand(count, outputs // 128, inputs // 128, device=DEVICE) * 0.1 + 0.01
    values = draw(count, outputs, inputs).to(torch.float8_e4m3fn)
    wide = [dequantize(*pair) for pair in zip(values, scales)]
    return values, scales, torch.stack(wide)


def test_every_e4m3_value_is_widened_exactly() -> None:
    """Products of one-hot rows are the weights; the interpreter knows no product in bf16."""
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    codes = torch.arange(128 * 128, device=DEVICE).view(1, 128, 128) * 37 % 256
    codes[codes % 128 == 127] = 0  # NaN
    values = codes.to(torch.uint8).view(torch.float8_e4m3fn)
    routing, rows = all_to_one(128), torch.eye(128, dtype=dtype, device=DEVICE)
    tiles = Tile(16, 64, 128, 4, 2, False), Tile(64, 128, 64, 4, 2, True, 2)
    swapped = Tile(16, 64, 128, 4, 3, True, swap=True, regroup=True)
    one = torch.ones(128, 1, device=DEVICE)
    for tile, f16 in product((*tiles, swapped), (False, True)):
        own = replace(tile, f16=f16)
        found = down_pairs(Activated(rows, one), values, routing, own, one[:1, None])
        assert torch.equal(found.T.float(), values[0].float()), own
    assert values.float().unique().numel() == 253, "all but NaN, and 0 once"


def test_tiles_that_cross_scales_are_refused() -> None:
    routing = routed(draw(4, 6), row_ranges([0], [4]), 2, True, 0, 1)
    values, scales, _ = quantized(1, 256, 128)
    for tile in (Tile(16, 256, 64, 4, 2, False), Tile(16, 64, 256, 4, 2, False)):
        with pytest.raises(AssertionError, match="crosses scales"):
            gate_up_pairs(draw(4, 128), values, routing, tile, scales)
    with pytest.raises(AssertionError, match="e4m3 weights have scales"):
        gate_up_pairs(draw(4, 128), values, routing, Tile(16, 64, 64, 4, 2, False))
    tile = Tile(16, 64, 64, 4, 2, True, swap=True, regroup=True)
    with pytest.raises(AssertionError, match="only e4m3 weights are regrouped"):
        gate_up_pairs(draw(4, 128), values.float(), routing, tile)


def all_to_one(rows: int) -> Routing:
    """Every row has one pair, with the only expert, of weight 1."""
    pairs = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    count = torch.full((1,), rows, dtype=torch.int32, device=DEVICE)
    weights = torch.ones(rows, 1, device=DEVICE)
    return Routing(weights, torch.zeros_like(pairs)[:, None], count, pairs[None])


SWAPPED = Tile(16, 64, 128, 4, 2, True, 2, True, True, f16=True)


@pytest.mark.parametrize("tile", [SWAPPED, Tile(16, 128, 64, 4, 2, False, f16=True)])
def test_down_takes_rows_of_any_size(tile: Tile) -> None:
    """Rows that are far from each other and beyond what f16 holds; zeros, infinite ones and NaN."""
    torch.manual_seed(5)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    values, scales, wide = quantized(1, 128, 256)
    powers = 2.0 ** torch.arange(-105, 95, 5, device=DEVICE)[:, None]
    rows = (draw(40, 256).bfloat16() * powers).to(dtype)
    rows[3], rows[5, 100], rows[7, 0] = 0.0, float("inf"), float("nan")
    peaks = rows.view(40, 2, 128).abs().amax(-1).float()
    found = down_pairs(Activated(rows, peaks), values, all_to_one(40), tile, scales)
    lost = torch.zeros(40, dtype=torch.bool, device=DEVICE)
    lost[[5, 7]] = True
    assert not found[lost].isfinite().any()
    due = rows.double() @ wide[0].double().T
    error = (found.double() - due)[~lost].norm(dim=1)
    assert (error <= due[~lost].norm(dim=1) * (1e-2 if DEVICE.type == "cuda" else 1e-6)).all()


def test_gate_up_takes_normed_rows_and_shows_others() -> None:
    """A row at the end of its range; one beyond it, which is lost, as one with NaN is."""
    torch.manual_seed(6)
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    values, scales, wide = quantized(2, 128, 256)
    rows = draw(6, 256).bfloat16().to(dtype)
    rows[1, 9], rows[3, 200], rows[4, 0] = 2.0**18, -(2.0**20), float("nan")
    gate_up, of_gate_up = values.view(1, 256, 256), scales.view(1, 2, 2)
    found = gate_up_pairs(rows, gate_up, all_to_one(6), SWAPPED, of_gate_up, with_peaks=True)
    gate, up = (rows.double() @ half.double().T for half in wide)
    due = torch.nn.functional.silu(gate) * up
    kept = [0, 1, 2, 5]
    assert not found.values[[3, 4]].isfinite().any()
    error = (found.values.double() - due)[kept].norm(dim=1)
    assert (error <= due[kept].norm(dim=1) * (2e-2 if DEVICE.type == "cuda" else 1e-5)).all()
    assert found.peaks is not None
    blocks = found.values[kept].unflatten(1, (2, 64)).abs()
    assert torch.equal(found.peaks[kept], blocks.amax(-1).float())


@pytest.mark.parametrize(
    "row", [2, *(pytest.param(row, marks=pytest.mark.slow) for row in (0, 1, 3, 4))]
)
def test_tiles_in_use_equal_widened_experts(row: int) -> None:
    tiles = E4M3_TILES[row][1]
    torch.manual_seed(7)
    (gate_up, of_gate_up, wide_gate_up), (down, of_down, wide_down) = (
        quantized(4, 128, 384), quantized(2, 384, 128)
    )  # fmt: skip
    rows = draw(150, 384)
    routing = routed(draw(150, 5), row_ranges([0], [150]), 2, True, 1, 2)
    scales = ExpertScales(of_gate_up.view(2, 2, 3), of_down)
    out = run_experts(rows, gate_up.view(2, 256, 384), down, routing, tiles, scales)
    ids = torch.where(routing.local_ids < 0, 5, routing.local_ids + 1).long()
    due = fused_experts(rows, wide_gate_up.view(2, 256, 384), wide_down, ids, routing.weights, 1)
    assert (out - due).norm() < (5e-3 if tiles.down.f16 else 2e-5) * due.norm()
