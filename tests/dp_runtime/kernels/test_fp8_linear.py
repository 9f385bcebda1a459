"""Products with e4m3 matrices in the interpreter, on CPU tensors, against widened ones.

The interpreter has no bfloat16 products; float32 and float16 show the same code paths.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.fp8_linear.run import multiply, widened
from dp_runtime.kernels.fp8_linear.tiles import (
    NUM_COUNTERS,
    LinearTile,
    choose_tile,
    interleave,
    product_bytes,
    whole_split,
    widened_from,
)
from dp_runtime.weights.fp8_blocks import BLOCK, dequantize, quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3}
NARROW = LinearTile(16, 64, 128, 1, 4, 3)


def matrix(outputs: int, inputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 values, their scales by output, and what they stand for."""
    weight = torch.randn(outputs, inputs) * torch.logspace(-2, 1, inputs)
    values, scales = quantize(weight)
    by_output = scales.repeat_interleave(BLOCK, 0)[:outputs].t().contiguous()
    wide = dequantize(values, scales)
    return interleave(values.contiguous()).to(DEVICE), by_output.to(DEVICE), wide.to(DEVICE)


FLAT = LinearTile(32, 64, 64, 2, 4, 3, swap=False)
COPIED = LinearTile(16, 64, 128, 2, 4, 3, tma=True)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tile", "dtype"),
    [
        (1, 64, 128, NARROW, torch.float32),
        (3, 70, 144, NARROW, torch.float16),
        (16, 256, 384, LinearTile(16, 64, 128, 3, 4, 3), torch.float32),
        (17, 100, 304, LinearTile(16, 64, 64, 2, 4, 3), torch.float16),
        (40, 129, 528, LinearTile(32, 64, 128, 3, 4, 3), torch.float16),
        (130, 200, 256, LinearTile(128, 128, 128, 2, 8, 3), torch.float32),
        (33, 130, 272, FLAT, torch.float32),
        (33, 130, 272, FLAT, torch.float16),
        (20, 100, 272, COPIED, torch.float32),
        (20, 100, 272, COPIED, torch.float16),
    ],
    ids=str,
)
def test_a_product_is_that_of_the_widened_matrix(
    rows: int, outputs: int, inputs: int, tile: LinearTile, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    values, scales, wide = matrix(outputs, inputs)
    x = torch.randn(rows, inputs + 16).to(DEVICE, dtype)[:, :inputs]
    whole = torch.full((rows, outputs + 5), 7.0, dtype=dtype, device=DEVICE)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)
    due = x.double() @ wide.double().t()
    for _ in range(2):  # the second time with the counters that the first one left
        found = multiply(x, values, scales, whole[:, :outputs], counters, tile)
        error = (found.double() - due).norm() / due.norm()
        assert error < TOLERANCE[dtype]
        assert (whole[:, outputs:] == 7).all()
        assert not counters.any()


def test_rows_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    values, scales, _ = matrix(130, 272)
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=DEVICE)
    x = torch.randn(20, 272, device=DEVICE)
    tile = LinearTile(16, 64, 128, 3, 4, 3)
    clean = multiply(x, values, scales, x.new_empty(20, 130), counters, tile)
    x[7] = float("nan")
    found = multiply(x, values, scales, x.new_empty(20, 130), counters, tile)
    others = [row for row in range(20) if row != 7]
    assert torch.equal(found[others], clean[others])
    assert found[7].isnan().all()


@pytest.mark.parametrize("shape", [(128, 128), (70, 144), (1, 496)], ids=str)
def test_a_widened_matrix_is_what_loading_it_widened_gives(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values, scales, wide = matrix(*shape)
    for dtype in (torch.float32, torch.float16):
        assert torch.equal(widened(values, scales, dtype), wide.to(dtype))


@pytest.mark.parametrize(
    ("outputs", "inputs"), [(512, 2048), (20608, 4096), (4096, 8192), (1024, 3072), (64, 64)]
)
def test_every_choice_fits_its_counters_and_its_memory(outputs: int, inputs: int) -> None:
    end = widened_from(outputs, inputs)
    for rows in range(1, end):
        tile = choose_tile(rows, outputs, inputs)
        assert tile is not None
        assert tile.split == whole_split(inputs, tile.split)
        tiles = -(-rows // tile.block_m) * -(-outputs // tile.block_n)
        assert tile.split == 1 or tiles <= NUM_COUNTERS
        sums = 0 if tile.split == 1 else tile.split * rows * outputs * 4
        assert product_bytes(end - 1, outputs, inputs) >= sums
    assert choose_tile(end, outputs, inputs) is None
    assert product_bytes(end, outputs, inputs) >= 2 * outputs * inputs


def test_tiles_are_the_measured_ones() -> None:
    """Of 397B's qkv+gate and output, and of the shared experts' down of 122B."""
    found = [choose_tile(rows, 17408, 4096) for rows in (8, 32, 128, 384, 385)]
    assert found == [
        LinearTile(16, 128, 128, 2, 4, 4, tma=True),
        LinearTile(32, 64, 128, 1, 4, 4, tma=True),
        LinearTile(64, 64, 128, 1, 4, 3, tma=True),
        LinearTile(128, 64, 128, 1, 4, 3, tma=True),
        None,
    ]
    assert choose_tile(128, 4096, 8192) == LinearTile(64, 64, 128, 3, 4, 3, tma=True)
    found = [choose_tile(rows, 3072, 1024) for rows in (1, 17, 33, 128, 129)]
    assert found == [
        LinearTile(16, 64, 128, 4, 4, 4, tma=True),
        LinearTile(32, 64, 128, 4, 4, 4, tma=True),
        LinearTile(64, 64, 128, 4, 4, 3, tma=True),
        LinearTile(64, 64, 128, 3, 4, 3, tma=True),
        None,
    ]


@pytest.mark.parametrize(("inputs", "split"), [(128, 4), (640, 4), (4096, 3), (2048, 8), (300, 2)])
def test_no_program_of_a_split_is_without_inputs(inputs: int, split: int) -> None:
    blocks, whole = -(-inputs // BLOCK), whole_split(inputs, split)
    share = -(-blocks // whole)
    assert 1 <= whole <= split
    assert (whole - 1) * share < blocks <= whole * share
