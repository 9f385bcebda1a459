"""Overlapped starts of Triton kernels, and the number of a device's multiprocessors.

With programmatic dependent launch a kernel starts while the one before it ends. Until it has called
`gdc_wait` it writes nothing, and reads only weights and what was written by a copy or by kernels
before the previous one. Every program calls gdc_wait, so when a kernel has finished, all earlier
kernels on the stream have finished too.
"""

from __future__ import annotations

from functools import cache

import torch
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["gdc_launch_dependents", "gdc_wait", "num_multiprocessors", "overlaps"]


@cache
def num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 2  # the interpreter: its programs take several tiles too
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlaps(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9  # has PDL
