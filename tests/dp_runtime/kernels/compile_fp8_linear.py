"""Compiles the products with e4m3 matrices for an SM90, which takes no GPU.

    TRITON_INTERPRET=0 python -m tests.dp_runtime.kernels.compile_fp8_linear

Tiles in use and others; the interpreter knows neither tensor cores nor shared memory.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.fp8_linear import run
from dp_runtime.kernels.fp8_linear.tiles import NUM_COUNTERS, LinearTile, choose_tile
from tests.dp_runtime.kernels.gated_delta.compile_all import Compiled

OUTPUTS, INPUTS = 12288, 2048
OTHERS = (
    LinearTile(16, 64, 128, 2, 4, 4, tma=True),
    LinearTile(64, 128, 128, 1, 8, 4, tma=True),
    LinearTile(128, 128, 64, 1, 8, 4, swap=False, tma=True),
)


def main() -> None:
    in_use = [choose_tile(rows, OUTPUTS, INPUTS) for rows in (1, 32, 64, 128, 256)]
    instead: dict[str, Any] = {"overlaps": lambda device: True}
    for name in ("product_kernel", "widen_kernel"):
        instead[name] = Compiled(getattr(run, name))
    weight, scales = torch.empty(OUTPUTS, INPUTS, dtype=E4M3), torch.ones(INPUTS // 128, OUTPUTS)
    x, out = (torch.zeros(4, size, dtype=torch.bfloat16) for size in (INPUTS, OUTPUTS))
    counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32)
    with patch.multiple(run, **instead):
        run.widened(weight, scales, torch.bfloat16)
        for tile in (*in_use, *OTHERS):
            assert tile is not None
            print(tile, flush=True)
            run.multiply(x, weight, scales, out, counters, tile)


if __name__ == "__main__":
    main()
