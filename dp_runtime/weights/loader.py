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
from dp_runtime.weights.fp8_blocks import (
    FP8,
    SCALE_SUFFIX,
    block_part,
    dequantize,
    num_blocks,
    quantize,
)

Shape = tuple[int, ...]
Part = tuple[slice, ...]

INTEGERS = ("I64",)
DTYPES = ("F64", "F32", "F16", "BF16")  # names as in the safetensors format
FP8_DTYPE = "F8_E4M3"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAPPED_BYTES = 256 << 20  # of files that may be mapped before they are opened anew


class WeightSource(Protocol):
    """Gives tensors by their name in a Hugging Face checkpoint, on `device` and in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    bytes_read: int

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        """The tensor `name` whose full shape is `shape`, or only the `part` this rank needs.

        What is stored in e4m3 with scales is widened.
        """

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """e4m3 values of a matrix stored so, and their scales; see `fp8_blocks`.

        Parts begin with a block.
        """

    def integers(self, name: str, shape: Shape) -> Tensor:
        """A tensor of int64, which stays so."""

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
        tensor = self._read(name, shape, part, (*DTYPES, FP8_DTYPE))
        self._on_bytes(tensor.numel() * self.dtype.itemsize)
        if tensor.dtype != FP8:
            return tensor.to(device=self.device, dtype=self.dtype, copy=True)
        scales = self._read_scales(name, shape, part)
        return dequantize(tensor.to(self.device), scales.to(self.device)).to(self.dtype)

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values = self._read(name, shape, part, (FP8_DTYPE,))
        scales = self._read_scales(name, shape, part)
        self._on_bytes(values.nbytes + scales.nbytes)
        return values.to(self.device, copy=True), scales.to(self.device)

    def integers(self, name: str, shape: Shape) -> Tensor:
        tensor = self._read(name, shape, None, INTEGERS)
        self._on_bytes(tensor.nbytes)
        return tensor.to(self.device, copy=True)

    def _read_scales(self, name: str, shape: Shape, part: Part | None) -> Tensor:
        """Of an e4m3 matrix or a part of it, float32 on the host."""
        blocks = tuple(num_blocks(size) for size in shape)
        block_parts = None if part is None else tuple(block_part(one) for one in part)
        name = f"{name}{SCALE_SUFFIX}"
        scales = self._read(name, blocks, block_parts, DTYPES).to(torch.float32, copy=True)
        require(bool(scales.isfinite().all()), name, "not finite", "finite scales")
        return scales

    def _read(self, name: str, shape: Shape, part: Part | None, dtypes: tuple[str, ...]) -> Tensor:
        """What a file has, mapped: copied before the next read."""
        file = self._file_of.get(name)
        if file is None:
            raise ValueError(f"{self._root}: tensor {name} is missing")
        if self._mapped > MAPPED_BYTES:
            self._open_files.clear()  # NOTE: pages of a mapped file stay in memory once read
            self._mapped = 0
        where = f"{self._root / file}: {name}"
        try:
            view = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{where}: {error}") from None
        found = tuple(view.get_shape())
        require(found == shape, f"{where}: shape", found, f"config.json asks for {shape}")
        dtype = view.get_dtype()
        require(dtype in dtypes, f"{where}: dtype", dtype, f"one of {', '.join(dtypes)}")
        mapped: Tensor = view[part if part is not None else ...]
        self.bytes_read += mapped.nbytes
        self._mapped += math.prod(shape) * mapped.dtype.itemsize
        return mapped

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

    @property
    def names(self) -> frozenset[str]:
        """Of all tensors."""
        return frozenset(self._file_of)

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            path = self._root / file
            try:
                self._open_files[file] = safe_open(path, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
        return self._open_files[file]


class DummyWeights:
    """Random weights: matrices N(0, 0.02) (in e4m3 rounded to that), norms 1, the rest 0.

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
        tensor = self._draw(name, shape)[part if part is not None else ...]
        self._on_bytes(tensor.numel() * self.dtype.itemsize)
        return tensor.to(self.dtype)

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values, scales = quantize(self._draw(name, shape))
        if part is not None:
            values, scales = values[part], scales[tuple(block_part(one) for one in part)]
        self._on_bytes(values.nbytes + scales.nbytes)
        return values, scales

    def integers(self, name: str, shape: Shape) -> Tensor:
        tensor = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._on_bytes(tensor.nbytes)
        return tensor

    def _draw(self, name: str, shape: Shape) -> Tensor:
        """A whole tensor in float32."""
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=self.device)
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator, device=self.device).mul_(0.02)

    def scalar(self, name: str) -> float | None:
        return None


class MetaWeights:
    """Loads nothing: tensors on the meta device, counted in `bytes_read` as `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.device = torch.device("meta")
        self.dtype = dtype
        self.bytes_read = 0

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        tensor = tensor[part if part is not None else ...]
        self.bytes_read += tensor.nbytes
        return tensor

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values = torch.empty(shape, dtype=FP8, device=self.device)
        scales = torch.empty([num_blocks(size) for size in shape], device=self.device)
        if part is not None:
            values, scales = values[part], scales[tuple(block_part(one) for one in part)]
        self.bytes_read += values.nbytes + scales.nbytes
        return values, scales

    def integers(self, name: str, shape: Shape) -> Tensor:
        tensor = torch.empty(shape, dtype=torch.int64, device=self.device)
        self.bytes_read += tensor.nbytes
        return tensor

    def scalar(self, name: str) -> float | None:
        return None


def tensor_names(directory: str) -> frozenset[str]:
    """What a directory's safetensors have; nothing where there are none."""
    if not any((Path(directory) / name).is_file() for name in (INDEX, SINGLE)):
        return frozenset()
    return Checkpoint(directory, torch.device("cpu"), torch.float32).names


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
