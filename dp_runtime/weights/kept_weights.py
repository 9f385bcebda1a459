"""KeptWeights: sources of weights that a copy in host memory is made of, or that read from one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence

import psutil
import torch
from torch import Tensor

from dp_runtime.errors import StartError
from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.weights.host_copy import CopyReader, CopyWriter, is_sealed
from dp_runtime.weights.source import Part, Shape, WeightSource

logger = logging.getLogger(__name__)

GIB = 2**30


class RecordedWeights:
    """A source whose answers are kept in a copy."""

    def __init__(self, source: WeightSource, number: int, writer: CopyWriter) -> None:
        self.device, self.dtype, self.runs_on = source.device, source.dtype, source.runs_on
        self.few_rows_kernel = source.few_rows_kernel
        self._source, self._number, self._writer = source, number, writer

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        tensor = self._source.load(name, shape, part)
        self._writer.add(self._call("load", name, shape, part), [tensor])
        return tensor

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values, scales = self._source.load_fp8(name, shape, part)
        self._writer.add(self._call("load_fp8", name, shape, part), [values, scales])
        return values, scales

    def float32(self, name: str, shape: Shape) -> Tensor:
        tensor = self._source.float32(name, shape)
        self._writer.add(self._call("float32", name, shape), [tensor])
        return tensor

    def integers(self, name: str, shape: Shape) -> Tensor:
        tensor = self._source.integers(name, shape)
        self._writer.add(self._call("integers", name, shape), [tensor])
        return tensor

    def scalar(self, name: str) -> float | None:
        value = self._source.scalar(name)
        self._writer.add(self._call("scalar", name), value=value)
        return value

    def has(self, name: str) -> bool:
        value = self._source.has(name)
        self._writer.add(self._call("has", name), value=value)
        return value

    def keeps_fp8(self, name: str) -> bool:
        value = self._source.keeps_fp8(name)
        self._writer.add(self._call("keeps_fp8", name), value=value)
        return value

    def equals(self, name: str, tensor: Tensor) -> bool:
        value = self._source.equals(name, tensor)
        self._writer.add(self._call("equals", name), value=value)
        return value

    def leave(self, names: Iterable[str]) -> None:
        self._source.leave(names)

    def require_all_read(self, skippable: Iterable[str], hints: Mapping[str, str]) -> None:
        self._source.require_all_read(skippable, hints)

    def _call(self, *what: object) -> str:
        return call_of(self._number, *what)


class CopiedWeights:
    """A source that has its answers from a copy, which was checked when it was made."""

    bytes_read = 0  # of the checkpoint

    def __init__(
        self,
        number: int,
        reader: CopyReader,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None],
        few_rows_kernel: bool,
    ) -> None:
        self.device = self.runs_on = device
        self.dtype, self.few_rows_kernel = dtype, few_rows_kernel
        self._number, self._reader, self._on_bytes = number, reader, on_bytes

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        (tensor,) = self._tensors("load", name, shape, part)
        return tensor

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values, scales = self._tensors("load_fp8", name, shape, part)
        return values, scales

    def float32(self, name: str, shape: Shape) -> Tensor:
        (tensor,) = self._tensors("float32", name, shape)
        return tensor

    def integers(self, name: str, shape: Shape) -> Tensor:
        (tensor,) = self._tensors("integers", name, shape)
        return tensor

    def scalar(self, name: str) -> float | None:
        value: float | None = self._reader.next(call_of(self._number, "scalar", name)).value
        return value

    def has(self, name: str) -> bool:
        return bool(self._reader.next(call_of(self._number, "has", name)).value)

    def keeps_fp8(self, name: str) -> bool:
        return bool(self._reader.next(call_of(self._number, "keeps_fp8", name)).value)

    def equals(self, name: str, tensor: Tensor) -> bool:
        return bool(self._reader.next(call_of(self._number, "equals", name)).value)

    def leave(self, names: Iterable[str]) -> None: ...

    def require_all_read(self, skippable: Iterable[str], hints: Mapping[str, str]) -> None: ...

    def _tensors(self, *what: object) -> list[Tensor]:
        stored = self._reader.next(call_of(self._number, *what)).tensors
        tensors = [self._reader.tensor(one) for one in stored]
        self._on_bytes(sum(tensor.nbytes for tensor in tensors))
        return tensors


def call_of(number: int, *what: object) -> str:
    return " ".join(map(str, (number, *what)))


class KeptWeights:
    """Sources over the copy at an address, if it is finished and of this identity.

    Else they read the checkpoint, and fill the copy if it is still empty. Leave it in a `with`.
    """

    def __init__(self, address: MemoryAddress | None, identity: str, num_bytes: int) -> None:
        """num_bytes: what the copy will take of the host's memory."""
        self._descriptor = None if address is None else address.open()
        self._wanted, self._identity, self._num_bytes = address is not None, identity, num_bytes
        self._reader: CopyReader | None = None
        self._writer: CopyWriter | None = None

    def __enter__(self) -> KeptWeights:
        return self

    def __exit__(self, *error: object) -> None:
        if self._reader is not None:
            self._reader.close()
        if self._descriptor is not None:
            os.close(self._descriptor)

    def sources(
        self,
        open_checkpoints: Callable[[], Sequence[WeightSource]],
        count: int,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None],
        few_rows_kernel: bool,
    ) -> Sequence[WeightSource]:
        if self._descriptor is not None and is_sealed(self._descriptor):
            reader = CopyReader(self._descriptor, device)
            if reader.identity == self._identity:
                self._reader = reader
                rest = reader, device, dtype, on_bytes, few_rows_kernel
                return [CopiedWeights(number, *rest) for number in range(count)]
            reader.close()
        sources = open_checkpoints()
        if self._descriptor is None or is_sealed(self._descriptor):
            return sources
        self._check_room()
        self._writer = writer = CopyWriter(self._descriptor, self._identity)
        return [RecordedWeights(source, number, writer) for number, source in enumerate(sources)]

    def finish(self) -> str:
        """Seal the copy if one was made; returns how the weights were loaded."""
        if self._reader is not None:
            self._reader.check_all_read()
            return f"from the copy in host memory, {_mib(self._reader.num_bytes)}"
        if self._writer is not None:
            return f"from the checkpoint; a copy keeps {_mib(self._writer.finish())} of host memory"
        if self._descriptor is not None:
            return "from the checkpoint; the copy in host memory is that of another shard"
        if self._wanted:
            return "from the checkpoint; no copy can be had on this host, which is not the driver's"
        return "from the checkpoint"

    def _check_room(self) -> None:
        available = psutil.virtual_memory().available
        if self._num_bytes > available:
            raise StartError(
                f"host_weights: the copy of a rank's weights takes {self._num_bytes / GIB:.2f} GiB "
                f"of host memory, and {available / GIB:.2f} GiB are available"
            )


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
