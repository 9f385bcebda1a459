"""What the expert kernels' launches depend on: the device's multiprocessors, and overlapped starts.

With programmatic dependent launch a kernel starts while the one before it ends. It may touch only
weights until it has waited (`gdc_wait`), and every program of it waits: so a kernel that has ended
implies that all before it have.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["fetch", "gdc_launch_dependents", "gdc_wait", "num_multiprocessors", "overlaps"]


@cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 2 for the interpreter, so that its programs take several tiles as well."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlaps(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch (capability 9.0 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@triton.jit
def fetch(weights, first_row, num_rows, width, ROWS: tl.constexpr):
    """Ask the L2 for the first four lines of ROWS rows of a matrix [num_rows, width]."""
    size: tl.constexpr = weights.dtype.element_ty.primitive_bitwidth // 8
    row = tl.minimum(first_row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64)
    line = tl.minimum(tl.arange(0, 4) * (128 // size), width - 1)
    at = (weights + row[:, None] * width + line).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
