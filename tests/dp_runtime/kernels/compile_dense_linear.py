"""Compiles products of few rows for an SM90, which takes no GPU.

    TRITON_INTERPRET=0 python -m tests.dp_runtime.kernels.compile_dense_linear

The interpreter knows neither tensor cores nor shared memory.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from dp_runtime.kernels.dense_linear import run
from dp_runtime.kernels.dense_linear.product import product_kernel
from dp_runtime.kernels.dense_linear.tiles import DenseTile
from tests.dp_runtime.kernels.gated_delta.compile_all import Compiled

OUTPUTS, INPUTS = 5120, 2048
TILES = (
    DenseTile(16, 64, 128, 1, 4, 4),
    DenseTile(16, 64, 128, 4, 4, 4),
    DenseTile(32, 64, 128, 4, 4, 4),
    DenseTile(64, 64, 128, 4, 4, 3),
    DenseTile(128, 64, 64, 2, 4, 4),
)


def main() -> None:
    instead: dict[str, Any] = {"overlaps": lambda device: True}
    instead["product_kernel"] = Compiled(product_kernel)
    weight = torch.empty(OUTPUTS, INPUTS, dtype=torch.bfloat16)
    x, out = (torch.zeros(4, size, dtype=torch.bfloat16) for size in (INPUTS, OUTPUTS))
    counters = torch.zeros(1024, dtype=torch.int32)
    with patch.multiple(run, **instead):
        for tile in TILES:
            print(tile, flush=True)
            run.multiply(x, weight, out, counters, tile)


if __name__ == "__main__":
    main()
