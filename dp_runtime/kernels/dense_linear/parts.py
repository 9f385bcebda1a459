"""Sums of a tile's parts, which programs leave in memory, by the last of them to come.

It adds them in their order and sets the tile's counter back, so that graphs can replay the kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def leave_part(total, at, inside, counter, split):
    """Store one part; say if all parts of the tile are there now."""
    tl.store(at, total, mask=inside)
    tl.debug_barrier()
    is_last = tl.atomic_add(counter, 1, sem="acq_rel") == split - 1
    tl.debug_barrier()
    return is_last


@triton.jit
def add_parts(at, size, inside, counter, split, AT_ONCE: tl.constexpr):
    """Add all parts, `size` from one to the next, AT_ONCE of which are asked for together."""
    total = tl.zeros(at.shape, tl.float32)
    for first in range(0, split, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            other = first + i
            there = inside if AT_ONCE == 1 else inside & (other < split)
            total += tl.load(at + other * size, mask=there, other=0.0, cache_modifier=".cg")
    tl.store(counter, 0)
    return total
