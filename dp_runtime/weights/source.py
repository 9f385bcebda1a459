"""WeightSource: where a model gets its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]
Part = tuple[slice, ...]


class WeightSource(Protocol):
    """Tensors by their names in a Hugging Face checkpoint, on `device` and in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    few_rows_kernel: bool  # `kernels.dense_linear` multiplies few rows where it was faster

    @property
    def runs_on(self) -> torch.device:
        """Return where the model will run: elsewhere than `device` if tensors are only counted."""

    @property
    def bytes_read(self) -> int: ...  # of a checkpoint's files

    def load(self, name: str, shape: Shape, part: Part | None = None) -> Tensor:
        """Read a part of a tensor of this full shape; e4m3 with scales is widened."""

    def load_fp8(self, name: str, shape: Shape, part: Part | None = None) -> tuple[Tensor, Tensor]:
        """Read e4m3 values and their scales; a part begins with a block of `fp8_blocks`."""

    def keeps_fp8(self, name: str) -> bool:
        """Tell if a matrix beside the experts is e4m3, and stays so where it can."""

    def float32(self, name: str, shape: Shape) -> Tensor:
        """Read a tensor that is float32 whatever `dtype` is; a dummy one is zero."""

    def integers(self, name: str, shape: Shape) -> Tensor:
        """Read a tensor that stays int64."""

    def scalar(self, name: str) -> float | None:
        """Read a tensor of one element; None if there is no such tensor."""

    def has(self, name: str) -> bool: ...

    def equals(self, name: str, tensor: Tensor) -> bool:
        """Tell if this matrix of the checkpoint is `tensor`; it is read in small parts."""

    def leave(self, names: Iterable[str]) -> None:
        """Name tensors of the model that need not be read, as other ranks read them."""

    def require_all_read(self, skippable: Iterable[str], hints: Mapping[str, str]) -> None:
        """Raise ValueError for a tensor neither read nor left, with the hint of its pattern."""


def ignore_bytes(num_bytes: int) -> None:
    pass


class NoCheckpoint:
    """The part of a `WeightSource` that has no checkpoint."""

    def scalar(self, name: str) -> float | None:
        return None

    def has(self, name: str) -> bool:
        return False

    def equals(self, name: str, tensor: Tensor) -> bool:
        return False

    def leave(self, names: Iterable[str]) -> None:
        pass

    def require_all_read(self, skippable: Iterable[str], hints: Mapping[str, str]) -> None:
        pass
