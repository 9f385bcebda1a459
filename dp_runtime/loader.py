"""Where weights come from: a safetensors checkpoint, random numbers, or nowhere (counted)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dp_runtime.errors import require

Shape = tuple[int, ...]
Part = tuple[slice, ...]

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # names as in the safetensors format
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAPPED_BYTES = 256 << 20  # of files that may be mapped before they are opened anew


class WeightSource(Protocol):
    """Gives tensors by their name in a Hugging Face checkpoint, on `device` and in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    bytes_read: int

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        """The tensor `name` whose full shape is `shape`, or only the `part` this rank needs."""

    def scalar(self, name: str) -> float | None:
        """The number that a tensor of one element holds; None if there is no such tensor."""


def ignore_bytes(num_bytes: int) -> None:
    """The progress callback of a load nobody watches."""


class Checkpoint:
    """A directory with `model.safetensors`, or with shards and their index.

    Reads nothing but the slices asked for and counts them in `bytes_read` (bytes on disk); on_bytes
    is called with the size of each in memory. Host memory never holds much more than a tensor: what
    was read is unmapped soon. Raises ValueError naming file and tensor.
    """

    def __init__(
        self,
        directory: str,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None] = ignore_bytes,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.bytes_read = 0
        self._on_bytes = on_bytes
        self._root = Path(directory)
        self._open_files: dict[str, Any] = {}
        self._mapped = 0
        self._file_of = self._read_index()

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        file = self._file_of.get(name)
        if file is None:
            raise ValueError(f"{self._root}: tensor {name} is missing")
        where = f"{self._root / file}: {name}"
        try:
            view = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{where}: {error}") from None
        found = tuple(view.get_shape())
        require(found == shape, f"{where}: shape", found, f"config.json asks for {shape}")
        dtype = view.get_dtype()
        require(dtype in DTYPE_BYTES, f"{where}: dtype", dtype, f"one of {', '.join(DTYPE_BYTES)}")
        mapped: Tensor = view[part if part is not None else ...]
        self.bytes_read += mapped.numel() * DTYPE_BYTES[dtype]
        self._on_bytes(mapped.numel() * self.dtype.itemsize)
        tensor = mapped.to(device=self.device, dtype=self.dtype, copy=True)
        self._mapped += math.prod(shape) * DTYPE_BYTES[dtype]
        if self._mapped > MAPPED_BYTES:
            self._open_files.clear()  # NOTE: pages of a mapped file stay in memory once read
            self._mapped = 0
        return tensor

    def scalar(self, name: str) -> float | None:
        file = self._file_of.get(name)
        if file is None:
            return None
        tensor: Tensor = self._open(file).get_tensor(name)
        where = f"{self._root / file}: {name}: shape"
        require(tensor.numel() == 1, where, tuple(tensor.shape), "one element")
        self.bytes_read += tensor.element_size()
        return float(tensor)

    def _read_index(self) -> dict[str, str]:
        """The file of every tensor."""
        path = self._root / INDEX
        if not path.is_file():
            require(
                (self._root / SINGLE).is_file(), "model", str(self._root),
                f"a directory with {SINGLE} or {INDEX}",
            )  # fmt: skip
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        try:
            files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            names = {str(name): str(file) for name, file in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not an index of safetensors: {error!r}") from None
        for file in sorted(set(names.values())):
            require((self._root / file).is_file(), str(path), file, "a file beside the index")
        return names

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            path = self._root / file
            try:
                self._open_files[file] = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
        return self._open_files[file]


class DummyWeights:
    """Random weights: matrices N(0, 0.02), norms 1, biases 0.

    A tensor's values are a pure function of seed and name, so a rank's part is the same slice
    whatever the number of ranks.
    """

    def __init__(
        self,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None] = ignore_bytes,
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.bytes_read = 0
        self._seed = seed
        self._on_bytes = on_bytes

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        if len(shape) == 1:
            whole = torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=self.device)
        else:
            digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
            generator = torch.Generator(self.device)
            generator.manual_seed(int.from_bytes(digest, "little") >> 1)
            whole = torch.randn(shape, generator=generator, device=self.device).mul_(0.02)
        tensor = whole[part if part is not None else ...]
        self._on_bytes(tensor.numel() * self.dtype.itemsize)
        return tensor.to(self.dtype)

    def scalar(self, name: str) -> float | None:
        return None


class CountedWeights:
    """Loads nothing: tensors on the meta device, counted in `bytes_read` as `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device = torch.device("meta")
        self.dtype = dtype
        self.bytes_read = 0

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        tensor = tensor[part if part is not None else ...]
        self.bytes_read += math.prod(tensor.shape) * self.dtype.itemsize
        return tensor

    def scalar(self, name: str) -> float | None:
        return None


def open_weights(
    directory: str,
    load_format: str,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None] = ignore_bytes,
) -> WeightSource:
    """The weights of a model directory, or seeded random ones for load_format "dummy"."""
    match load_format:
        case "safetensors":
            return Checkpoint(directory, device, dtype, on_bytes)
        case "dummy":
            return DummyWeights(seed, device, dtype, on_bytes)
        case _:
            raise ValueError(f"load_format: {load_format!r} is not allowed; safetensors or dummy")
