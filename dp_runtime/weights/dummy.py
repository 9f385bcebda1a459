"""Weights without a checkpoint: random ones, and none at all, which are only counted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Container

import torch
from torch import Tensor

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.weights.fp8_blocks import quantize, scale_part, scale_shape
from dp_runtime.weights.source import NoCheckpoint, Part, Shape, ignore_bytes


class DummyWeights(NoCheckpoint):
    """Random weights, a function of seed and name: the same model on any number of ranks."""

    def __init__(
        self,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        on_bytes: Callable[[int], None] = ignore_bytes,
        fp8: Container[str] = (),  # names that stay e4m3
        few_rows_kernel: bool = False,
    ) -> None:
        self.device = self.runs_on = device
        self.dtype, self.few_rows_kernel = dtype, few_rows_kernel
        self.bytes_read = 0
        self._seed = seed
        self._on_bytes = on_bytes
        self._fp8 = fp8

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        tensor = self._draw(name, shape)[part if part is not None else ...]
        self._on_bytes(tensor.numel() * self.dtype.itemsize)
        return tensor.to(self.dtype)

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values, scales = quantize(self._draw(name, shape))
        if part is not None:
            values, scales = values[part], scales[scale_part(part)]
        self._on_bytes(values.nbytes + scales.nbytes)
        return values, scales

    def keeps_fp8(self, name: str) -> bool:
        return name in self._fp8

    def float32(self, name: str, shape: Shape) -> Tensor:
        return self._zeros(shape, torch.float32)

    def integers(self, name: str, shape: Shape) -> Tensor:
        return self._zeros(shape, torch.int64)

    def _zeros(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        tensor = torch.zeros(shape, dtype=dtype, device=self.device)
        self._on_bytes(tensor.nbytes)
        return tensor

    def _draw(self, name: str, shape: Shape) -> Tensor:
        if len(shape) == 1:
            return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, device=self.device)
        digest = hashlib.blake2b(f"{self._seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(self.device)
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        return torch.randn(shape, generator=generator, device=self.device).mul_(0.02)


class MetaWeights(NoCheckpoint):
    """Tensors on the meta device, counted in `bytes_read`."""

    def __init__(
        self,
        dtype: torch.dtype,
        runs_on: torch.device,
        fp8: Container[str] = (),
        few_rows_kernel: bool = False,
    ) -> None:
        self.device, self.runs_on = torch.device("meta"), runs_on
        self.dtype, self.few_rows_kernel = dtype, few_rows_kernel
        self.bytes_read = 0
        self._fp8 = fp8

    def keeps_fp8(self, name: str) -> bool:
        return name in self._fp8

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        tensor = tensor[part if part is not None else ...]
        self.bytes_read += tensor.nbytes
        return tensor

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        values = torch.empty(shape, dtype=E4M3, device=self.device)
        scales = torch.empty(scale_shape(shape), device=self.device)
        if part is not None:
            values, scales = values[part], scales[scale_part(part)]
        self.bytes_read += values.nbytes + scales.nbytes
        return values, scales

    def float32(self, name: str, shape: Shape) -> Tensor:
        return self._empty(shape, torch.float32)

    def integers(self, name: str, shape: Shape) -> Tensor:
        return self._empty(shape, torch.int64)

    def _empty(self, shape: Shape, dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=self.device)
        self.bytes_read += tensor.nbytes
        return tensor
