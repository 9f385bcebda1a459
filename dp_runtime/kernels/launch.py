"""What launches of Triton kernels depend on: the device's multiprocessors, and overlapped starts.

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
    """Of a GPU; 2 for the interpreter, so that its programs take several tiles as well."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def overlaps(device: torch.device) -> bool:
    """Whether the device knows programmatic dependent launch (capability 9.0 and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
