"""Products of few rows in the interpreter, on CPU tensors, against float64 ones.

The interpreter has no bfloat16 products; float32 and float16 show the same code paths.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.dense_linear.measured import FewRowsTiles
from dp_runtime.kernels.dense_linear.run import multiply
from dp_runtime.kernels.dense_linear.tiles import DenseTile

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}
WHOLE = DenseTile(16, 64, 64, 1, 4, 3)
SHARED = DenseTile(16, 64, 64, 3, 4, 3)
TALL = DenseTile(32, 64, 64, 2, 4, 3)


def counters_for(tile: DenseTile, rows: int, outputs: int) -> Tensor:
    return torch.zeros(tile.num_tiles(rows, outputs), dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("rows", "outputs", "inputs", "tile", "dtype"),
    [
        (1, 64, 128, WHOLE, torch.float32),
        (17, 70, 112, WHOLE, torch.float16),
        (5, 100, 384, SHARED, torch.float32),
        (16, 129, 272, SHARED, torch.float16),  # the last part is smaller
        (33, 130, 272, TALL, torch.float16),
        (20, 64, 640, DenseTile(16, 64, 128, 5, 4, 3), torch.float32),  # parts in two turns
        (70, 150, 256, DenseTile(64, 128, 128, 1, 8, 3), torch.float32),
    ],
    ids=str,
)
def test_a_product_is_the_exact_one_but_for_rounding(
    rows: int, outputs: int, inputs: int, tile: DenseTile, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(outputs, inputs) * torch.logspace(-2, 1, inputs)).to(DEVICE, dtype)
    x = torch.randn(rows, inputs + 16).to(DEVICE, dtype)[:, :inputs]
    whole = torch.full((rows, outputs + 5), 7.0, dtype=dtype, device=DEVICE)
    counters = counters_for(tile, rows, outputs)
    due = x.double() @ weight.double().t()
    for _ in range(2):  # the second time with the counters that the first one left
        found = multiply(x, weight, whole[:, :outputs], counters, tile)
        assert (found.double() - due).norm() / due.norm() < TOLERANCE[dtype]
        assert (whole[:, outputs:] == 7).all()
        assert not counters.any()


@pytest.mark.parametrize("tile", [SHARED, TALL], ids=str)
def test_rows_do_not_see_each_other(tile: DenseTile) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 272, device=DEVICE), torch.randn(130, 272, device=DEVICE)
    counters = counters_for(tile, 40, 130)
    clean = multiply(x, weight, x.new_empty(40, 130), counters, tile)
    x[7] = float("nan")
    found = multiply(x, weight, x.new_empty(40, 130), counters, tile)
    others = [row for row in range(40) if row != 7]
    assert torch.equal(found[others], clean[others])
    assert found[7].isnan().all()


def test_no_rows_are_no_product() -> None:
    weight, counters = torch.zeros(130, 272, device=DEVICE), counters_for(SHARED, 1, 130)
    out = weight.new_empty(0, 130)
    assert multiply(weight[:0], weight, out, counters, SHARED) is out
    assert not counters.any()


@pytest.mark.parametrize(
    ("inputs", "tile", "share"),
    [
        (2048, DenseTile(16, 64, 128, 3, 4, 3), 768),
        (4096, DenseTile(16, 64, 128, 4, 4, 3), 1024),
        (272, SHARED, 128),
    ],
    ids=str,
)
def test_parts_are_whole_blocks(inputs: int, tile: DenseTile, share: int) -> None:
    assert tile.share(inputs) == share


@pytest.mark.parametrize("inputs", [272, 384, 2048, 4096])
@pytest.mark.parametrize("tile", [WHOLE, SHARED, TALL, DenseTile(16, 64, 128, 2, 4, 3)])
def test_a_small_matrix_has_the_same_kernel(inputs: int, tile: DenseTile) -> None:
    simple, few = tile.kind(inputs)
    assert few <= 2 * tile.block_k
    assert (simple.split - 1) * simple.share(few) < few
    for of_both in (
        lambda tile, inputs: tile.share(inputs) * tile.split == inputs,
        lambda tile, inputs: tile.split > 1,
    ):
        assert of_both(simple, few) == of_both(tile, inputs)


def test_a_split_into_more_parts_than_there_are_inputs_is_refused() -> None:
    tile = DenseTile(16, 64, 64, 4, 4, 3)
    weight = torch.zeros(64, 192, device=DEVICE)
    with pytest.raises(AssertionError, match="programs without inputs"):
        multiply(weight[:1], weight, weight.new_empty(1, 64), counters_for(tile, 1, 64), tile)


@pytest.mark.parametrize(
    ("outputs", "inputs", "split", "chosen"),
    [
        (2048, 4096, 4, {16: range(17), 32: range(17, 33)}),
        (9216, 2048, 1, {16: [16]}),
        (12352, 2048, 1, {16: range(8, 17), 32: range(17, 33), 64: range(33, 65)}),
        (4096, 8192, 4, {16: range(17), 32: range(17, 33), 64: range(33, 65)}),
        (5120, 2048, 0, {}),
        (17408, 4096, 0, {}),
        (20608, 4096, 0, {}),
    ],
)
def test_an_h200_was_faster_with_these_rows_by_our_kernel(
    outputs: int, inputs: int, split: int, chosen: dict[int, Sequence[int]]
) -> None:
    tiles = FewRowsTiles.of(outputs, inputs)
    due = dict.fromkeys(range(201)) | {
        rows: DenseTile(block_m, 64, 128, split, 4, 3 if block_m == 64 else 4)
        for block_m, all_rows in chosen.items()
        for rows in all_rows
    }
    assert {rows: tiles.choose(rows) for rows in due} == due
    assert all(tile.kind(inputs)[1] == min(split, 2) * 128 for tile in tiles.tiles)
