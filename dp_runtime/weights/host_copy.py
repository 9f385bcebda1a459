"""Memory of the host that keeps a rank's weights for the process that takes its place.

It has no name in any directory: it lives as long as who made it, or maps it. A copy is finished
once the kernel has sealed it, and can not change from then on.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.weights.read_ahead import ReadAhead

ALIGNMENT = 64
_NAME = "dp-runtime-weights-"
_LENGTH = 8  # bytes of the index's length, at the end of the copy
_WRITE_AT_ONCE = 1 << 30


class CopyMemory:
    """The memory of one copy, empty at first; whoever makes it keeps it until `close`."""

    def __init__(self) -> None:
        name = _NAME + secrets.token_hex(4)
        self._descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.address = MemoryAddress.of(self._descriptor, name)

    @property
    def is_finished(self) -> bool:
        return is_sealed(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


def is_sealed(descriptor: int) -> bool:
    return bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_WRITE)


@dataclass(frozen=True)
class StoredTensor:
    dtype: str  # as torch names it
    shape: Sequence[int]
    offset: int


@dataclass(frozen=True)
class Entry:
    """An answer of a source of weights: the call, and the tensors or the plain value it gave."""

    call: str
    tensors: Sequence[StoredTensor]
    value: Any = None


class CopyWriter:
    """Appends answers; the copy is of use once `finish` has sealed it."""

    def __init__(self, descriptor: int, identity: str) -> None:
        self._descriptor, self._identity = descriptor, identity
        self._end = 0
        self._entries: list[Entry] = []

    def add(self, call: str, tensors: Sequence[Tensor] = (), value: Any = None) -> None:
        self._entries.append(Entry(call, [self._store(tensor) for tensor in tensors], value))

    def finish(self) -> int:
        """Write the index and seal the copy; returns its size in bytes."""
        index = {"identity": self._identity, "entries": [asdict(one) for one in self._entries]}
        text = json.dumps(index).encode()
        self._write(memoryview(text + len(text).to_bytes(_LENGTH, "little")))
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
        return self._end

    def _store(self, tensor: Tensor) -> StoredTensor:
        self._end += -self._end % ALIGNMENT
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored = StoredTensor(dtype, tuple(tensor.shape), self._end)
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._write(flat.view(torch.uint8).numpy().data)
        return stored

    def _write(self, content: memoryview) -> None:
        while content:
            written = os.pwrite(self._descriptor, content[:_WRITE_AT_ONCE], self._end)
            self._end, content = self._end + written, content[written:]


class CopyReader:
    """Gives the answers of a finished copy again, to the same calls in the same order."""

    def __init__(self, descriptor: int, device: torch.device) -> None:
        self.num_bytes = os.fstat(descriptor).st_size
        index_end = self.num_bytes - _LENGTH
        length = int.from_bytes(os.pread(descriptor, _LENGTH, index_end), "little")
        index = json.loads(os.pread(descriptor, length, index_end - length))
        self.identity: str = index["identity"]
        self._entries = [
            Entry(one["call"], [StoredTensor(**each) for each in one["tensors"]], one["value"])
            for one in reversed(index["entries"])
        ]
        self._device = device
        self._ahead = ReadAhead(descriptor, index_end - length, device)

    def next(self, call: str) -> Entry:
        entry = self._entries.pop()
        assert entry.call == call, f"the copy of the weights has {entry.call}, not {call}"
        return entry

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Bring a tensor of the entry that came last to the device."""
        dtype = getattr(torch, stored.dtype)
        num_bytes = math.prod(stored.shape) * dtype.itemsize
        content = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        self._ahead.copy(stored.offset, content)
        return content.view(dtype).view(tuple(stored.shape))

    def check_all_read(self) -> None:
        assert not self._entries, f"{len(self._entries)} answers of the copy were not asked for"

    def close(self) -> None:
        self._ahead.close()
