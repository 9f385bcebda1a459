"""WeightSource: what gives a model its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]
Part = tuple[slice, ...]


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

    def has(self, name: str) -> bool:
        """Whether a checkpoint has this tensor; random weights are whatever is asked for."""

    def equals(self, name: str, tensor: Tensor) -> bool:
        """Whether this tensor would be loaded as the matrix `tensor`; reads it in small parts."""

    def leave(self, names: Iterable[str]) -> None:
        """Name tensors that belong to the model and need not be read, as other ranks do it."""

    def require_all_read(self, skippable: Iterable[str], hints: Mapping[str, str]) -> None:
        """ValueError for a tensor of the checkpoint that was neither read nor left.

        skippable: patterns of names on which nothing depends. hints: what to say of others.
        """


def ignore_bytes(num_bytes: int) -> None:
    """The progress callback of a load nobody watches."""


class NoCheckpoint:
    """The part of `WeightSource` that is about a checkpoint, where there is none."""

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
