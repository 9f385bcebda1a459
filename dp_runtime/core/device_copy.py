"""Copies between host and device that nothing waits for until they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    if array.size:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    else:  # numpy gives it strides of 0, with which torch views no other dtype
        tensor = torch.empty(array.shape, dtype=_torch_dtype(array.dtype))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


ALIGNMENT = 128  # bytes, between arrays that travel together: kernels load wide words


def aligned_offsets(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return where each array of so many bytes begins in a shared buffer, then its total size."""
    return tuple(accumulate((-(-n // ALIGNMENT) * ALIGNMENT for n in sizes), initial=0))


def all_on_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Copy arrays to a device in one transfer, without waiting for it."""
    starts = aligned_offsets([array.nbytes for array in arrays])
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    words = packed.numpy()
    for array, start in zip(arrays, starts):
        words[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    packed = packed.to(device, non_blocking=True)
    return tuple(
        packed[start : start + array.nbytes].view(_torch_dtype(array.dtype)).view(array.shape)
        for array, start in zip(arrays, starts)
    )


@cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


class HostCopy:
    """Tensors on their way to the host; `wait` waits for them.

    NOTE: reading the tensors would also wait for the next step, which is queued after the copy.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = tuple(tensor.to("cpu", non_blocking=True) for tensor in tensors)
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._done = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._done.record()
        self._made_s = perf_counter()

    def wait(self) -> tuple[Tensor, ...]:
        if self._done is not None:
            self._done.synchronize()
        return self._tensors

    def seconds_since(self, other: HostCopy) -> float:
        """Return the device's time from another copy, both waited for, to this one."""
        if self._done is None or other._done is None:
            return self._made_s - other._made_s
        elapsed_ms: float = other._done.elapsed_time(self._done)
        return elapsed_ms / 1e3
