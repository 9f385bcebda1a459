"""How the router's product is cut: as an H200 measured it to be fastest, or nearly so."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.moe_router import RouterTile, choose_router_tile


@pytest.mark.parametrize(
    ("num_experts", "hidden", "rows", "due"),
    [
        (128, 2048, 8, RouterTile(16, 128)),
        (128, 2048, 16, RouterTile(16, 128)),
        (128, 2048, 64, RouterTile(16, 256)),
        (128, 2048, 256, RouterTile(64, 256)),
        (128, 2048, 512, RouterTile(64, 256)),
        (256, 2048, 16, RouterTile(32, 128)),
        (256, 2048, 64, RouterTile(32, 256)),
        (256, 2048, 256, RouterTile(64, 256)),
        (256, 2048, 512, RouterTile(64, 256)),
        (512, 4096, 16, RouterTile(32, 256)),
        (512, 4096, 64, RouterTile(32, 256)),
        (512, 4096, 256, RouterTile(64, 512)),
        (512, 4096, 512, None),
    ],
)
def test_tiles_are_those_that_were_measured(
    num_experts: int, hidden: int, rows: int, due: RouterTile | None
) -> None:
    assert choose_router_tile(rows, hidden, num_experts) == due


@pytest.mark.parametrize("num_experts", [128, 256, 512])
def test_more_rows_than_are_split_are_for_cublas(num_experts: int) -> None:
    assert choose_router_tile(513, 4096, num_experts) is None


def test_a_split_ends_with_the_columns() -> None:
    """A hidden size that is smaller than a part has one part."""
    assert choose_router_tile(256, 64, 512) == RouterTile(64, 256)
