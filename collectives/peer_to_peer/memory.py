"""Device memory that other processes of the host map, through the CUDA driver's IPC handles."""

from __future__ import annotations

import ctypes
import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HANDLE_BYTES = 64
MAX_VIEWS = 4096  # that are kept
_LAZY_ENABLE_PEER_ACCESS = 1
_TYPES = {torch.int32: "<i4", torch.uint8: "|u1"}


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * HANDLE_BYTES)]


class PeerMemory:
    """Zeroed memory on the current device; `handle` lets other processes open it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        pointer = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(num_bytes))
        self.address = pointer.value
        self._views: dict[tuple[int, tuple[int, ...], torch.dtype], Tensor] = {}
        handle = _Handle()
        _call("cuIpcGetMemHandle", ctypes.byref(handle), pointer)
        self.handle = bytes(memoryview(handle).cast("B"))
        self.view(0, (num_bytes,), torch.uint8).zero_()
        torch.cuda.synchronize()

    def view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Make a tensor over the memory from byte `offset` on; valid until `free`."""
        key = (offset, shape, dtype)
        if key not in self._views:
            if len(self._views) >= MAX_VIEWS:
                self._views.clear()
            self._views[key] = self._make_view(*key)
        return self._views[key]

    def _make_view(self, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        assert offset + size <= self.num_bytes, f"{offset} + {size} of {self.num_bytes} bytes"
        integers = dtype if dtype in _TYPES else torch.uint8
        plain = shape if dtype in _TYPES else (size,)
        interface = {
            "shape": plain,
            "typestr": _TYPES[integers],
            "data": (self.address + offset, False),
            "version": 3,
        }
        tensor = torch.as_tensor(SimpleNamespace(__cuda_array_interface__=interface), device="cuda")
        return tensor if dtype in _TYPES else tensor.view(dtype).view(shape)

    def free(self) -> None:
        """Release it; no peer may have it open any more."""
        _call("cuMemFree_v2", ctypes.c_uint64(self.address))


def open_handle(handle: bytes) -> int:
    pointer = ctypes.c_uint64()
    _call(
        "cuIpcOpenMemHandle_v2", ctypes.byref(pointer), _Handle.from_buffer_copy(handle),
        ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS),
    )  # fmt: skip
    return pointer.value


def close_address(address: int) -> None:
    _call("cuIpcCloseMemHandle", ctypes.c_uint64(address))


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    torch.cuda.current_stream()  # makes sure that this thread has the device's context
    status = getattr(_driver(), name)(*arguments)
    if status != 0:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        reason = (text.value or b"unknown").decode()
        raise RuntimeError(f"CUDA driver: {name} failed with {status}: {reason}")
