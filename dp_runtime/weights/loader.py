"""Checkpoint: the safetensors of a model directory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.errors import require
from dp_runtime.weights.dummy import DummyWeights
from dp_runtime.weights.files import is_present, read_json, shown
from dp_runtime.weights.fp8_blocks import (
    SCALE_SUFFIX,
    dequantize,
    scale_part,
    scale_shape,
)
from dp_runtime.weights.source import Part, Shape, WeightSource, ignore_bytes

INTEGERS = ("I64",)
DTYPES = ("F64", "F32", "F16", "BF16")  # names as in the safetensors format
FP8_DTYPE = "F8_E4M3"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ROWS_COMPARED = 8192
MAX_PATH = 255  # characters of a shard's name
MAPPED_BYTES = 256 << 20  # of files that may be mapped before they are opened anew


class Checkpoint:
    """A directory with `model.safetensors`, or with shards and their index.

    Only the slices asked for are read: `bytes_read` counts them on disk, on_bytes gets the size of
    each in memory. Raises ValueError naming file and tensor.
    """

    def __init__(
        self,
        directory: str,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None] = ignore_bytes,
        fp8: Container[str] = (),  # names that stay e4m3
        few_rows_kernel: bool = False,
    ) -> None:
        self.device = self.runs_on = device
        self.dtype, self.few_rows_kernel = dtype, few_rows_kernel
        self.bytes_read = 0
        self._on_bytes, self._fp8 = on_bytes, fp8
        self._root = Path(directory)
        self._open_files: dict[str, Any] = {}
        self._mapped = 0
        self._known: set[str] = set()  # tensors that were read, or left to other ranks
        self._file_of = self._read_index()

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        tensor = self._read(name, shape, part, (*DTYPES, FP8_DTYPE))
        self._on_bytes(tensor.numel() * self.dtype.itemsize)
        if tensor.dtype != E4M3:
            scale = f"{name}{SCALE_SUFFIX}"
            require(not self.has(scale), scale, "in the checkpoint", f"{name} is not e4m3")
            return tensor.to(device=self.device, dtype=self.dtype, copy=True)
        scales = self._read_scales(name, shape, part)
        return dequantize(tensor.to(self.device), scales.to(self.device)).to(self.dtype)

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values = self._read(name, shape, part, (FP8_DTYPE,))
        scales = self._read_scales(name, shape, part)
        self._on_bytes(values.nbytes + scales.nbytes)
        return values.to(self.device, copy=True), scales.to(self.device)

    def float32(self, name: str, shape: Shape) -> Tensor:
        tensor = self._read(name, shape, None, DTYPES)
        self._on_bytes(tensor.numel() * 4)
        return tensor.to(device=self.device, dtype=torch.float32, copy=True)

    def integers(self, name: str, shape: Shape) -> Tensor:
        tensor = self._read(name, shape, None, INTEGERS)
        self._on_bytes(tensor.nbytes)
        return tensor.to(self.device, copy=True)

    def _read_scales(self, name: str, shape: Shape, part: Part | None) -> Tensor:
        part = None if part is None else scale_part(part)
        name = f"{name}{SCALE_SUFFIX}"
        scales = self._read(name, scale_shape(shape), part, DTYPES).to(torch.float32, copy=True)
        require(bool(scales.isfinite().all()), name, "not finite", "finite scales")
        return scales

    def _read(self, name: str, shape: Shape, part: Part | None, dtypes: tuple[str, ...]) -> Tensor:
        """Map a part of a tensor; it must be copied before the next read."""
        if self._mapped > MAPPED_BYTES:
            self._open_files.clear()  # NOTE: pages of a mapped file stay in memory once read
            self._mapped = 0
        where, view = self._find(name, dtypes)
        found = tuple(view.get_shape())
        require(found == shape, f"{where}: shape", found, f"config.json asks for {shape}")
        mapped: Tensor = view[part if part is not None else ...]
        self.bytes_read += mapped.nbytes
        stacked = len(mapped) if mapped.dim() == 3 else shape[0]
        self._mapped += stacked * math.prod(shape[1:]) * mapped.dtype.itemsize
        return mapped

    def _find(self, name: str, dtypes: tuple[str, ...]) -> tuple[str, Any]:
        """Return where a tensor is, for messages, and the view that reads parts of it."""
        file = self._file_of.get(name)
        if file is None:
            raise ValueError(f"{self._root}: tensor {name} is missing")
        self._known.add(name)
        where = f"{self._root / file}: {name}"
        try:
            view = self._open(file).get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{where}: {shown(error)}") from None
        dtype = view.get_dtype()
        require(dtype in dtypes, f"{where}: dtype", dtype, f"one of {', '.join(dtypes)}")
        return where, view

    def scalar(self, name: str) -> float | None:
        if not self.has(name):
            return None
        where, view = self._find(name, DTYPES)
        shape = tuple(view.get_shape())
        require(math.prod(shape) == 1, f"{where}: shape", shape, "one element")
        tensor: Tensor = self._open(self._file_of[name]).get_tensor(name)
        self.bytes_read += tensor.element_size()
        return float(tensor)

    def has(self, name: str) -> bool:
        return name in self._file_of

    def keeps_fp8(self, name: str) -> bool:
        return name in self._fp8

    def equals(self, name: str, tensor: Tensor) -> bool:
        shape = tuple(tensor.shape)
        for start in range(0, shape[0], ROWS_COMPARED):
            rows = slice(start, min(start + ROWS_COMPARED, shape[0]))
            found = self._read(name, shape, (rows, slice(None)), DTYPES)
            if not torch.equal(found.to(self.device, self.dtype), tensor[rows]):
                return False
        return True

    def leave(self, names: Iterable[str]) -> None:
        for name in names:
            self._known |= {name, f"{name}{SCALE_SUFFIX}"}

    def require_all_read(self, skippable: Iterable[str], hints: Mapping[str, str]) -> None:
        skip, file_of = re.compile("|".join(skippable)), dict(self._file_of)
        for file in dict.fromkeys(self._file_of.values()):
            names = self._open(file).keys()
            for name in names:
                if (other := file_of.setdefault(name, file)) != file:
                    self._require_same(name, other, file)
        left = sorted(n for n in file_of.keys() - self._known if not skip.search(n))
        if not left:
            return
        fields = next((text for pattern, text in hints.items() if re.search(pattern, left[0])), "")
        hint = f"; see {fields} in config.json" if fields else ""
        more = f"; {len(left) - 1:,} more like it" if len(left) > 1 else ""
        raise ValueError(
            f"{self._root / file_of[left[0]]}: {shown(left[0])}: the model that config.json "
            f"describes has no such tensor{hint}{more}"
        )

    def _require_same(self, name: str, *files: str) -> None:
        """Refuse a tensor of two shards that differs: libraries choose one by other rules."""
        one, other = (self._open(file).get_tensor(name) for file in files)
        same = one.shape == other.shape and one.dtype == other.dtype
        same = same and torch.equal(*(t.flatten().view(torch.uint8) for t in (one, other)))
        require(
            same,
            f"{self._root / files[1]}: {shown(name)}",
            "in this shard",
            f"{files[0]} has another",
        )

    def _read_index(self) -> dict[str, str]:
        path = self._root / INDEX
        if not is_present(path):
            require(
                is_present(self._root / SINGLE), "model", str(self._root),
                f"a directory with {SINGLE} or {INDEX}",
            )  # fmt: skip
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        index = read_json(path, "an index of safetensors")
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict):
            raise ValueError(f"{path}: not an index of safetensors: it has no weight_map object")
        require(
            SINGLE in files.values() or not is_present(self._root / SINGLE), str(path), SINGLE,
            f"transformers reads {SINGLE}, which lies beside this index and is not in it: keep one",
        )  # fmt: skip
        for file in dict.fromkeys(map(str, files.values())):
            parts = PurePosixPath(file).parts
            inside = 0 < len(file) <= MAX_PATH and ".." not in parts and not file.startswith("/")
            ok = inside and is_present(self._root / file)
            require(ok, str(path), shown(file), "a file beside the index")
        return {str(name): str(file) for name, file in files.items()}

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def _open(self, file: str) -> Any:
        if file not in self._open_files:
            path = self._root / file
            try:
                self._open_files[file] = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                text = f"{path}: not a readable safetensors file: {shown(error)}"
                raise ValueError(text) from None
        return self._open_files[file]


def tensor_names(directory: str) -> frozenset[str]:
    if not any(is_present(Path(directory) / name) for name in (INDEX, SINGLE)):
        return frozenset()
    return Checkpoint(directory, torch.device("cpu"), torch.float32).names


def open_weights(
    directory: str,
    load_format: str,
    seed: int,
    dtype: torch.dtype,
    device: torch.device,
    on_bytes: Callable[[int], None] = ignore_bytes,
    fp8: Container[str] = (),
    few_rows_kernel: bool = False,
) -> WeightSource:
    match load_format:
        case "safetensors":
            return Checkpoint(directory, device, dtype, on_bytes, fp8, few_rows_kernel)
        case "dummy":
            return DummyWeights(seed, device, dtype, on_bytes, fp8, few_rows_kernel)
        case _:
            raise ValueError(f"load_format: {load_format!r} is not allowed; safetensors or dummy")
