"""AttentionPlan: what all layers of a pass have in common, made before the first of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dp_runtime.attention.contract import (
    Comparison,
    compare,
    slots_due,
    tensor_comparisons,
    value_comparisons,
)
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.core.attention_metadata import AttentionMetadata

Shape = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class LayerCache:
    layer: int
    pool: Tensor  # [num_pages, 2, num_kv_heads, page_size, head_dim]
    scales: KvScales


@dataclass(frozen=True, eq=False)
class CacheSlots:
    """The slots of a pass's new keys and values, the same in every layer."""

    mapping: Tensor  # [rows] int32: page * page_size + offset
    page_size: int

    @cached_property
    def pages(self) -> Tensor:  # [rows] int64, for torch; GPU kernels read the mapping
        return self.mapping.long() // self.page_size

    @cached_property
    def offsets(self) -> Tensor:  # [rows] int64, within the pages
        return self.mapping.long() % self.page_size


@dataclass(frozen=True, eq=False)
class AttentionPlan(ABC):
    """Where a pass's keys and values are appended, and how its queries attend."""

    metadata: AttentionMetadata
    slots: CacheSlots
    spec: AttentionSpec

    @abstractmethod
    def attend(self, q: Tensor, cache: LayerCache, out: Tensor | None = None) -> Tensor:
        """Attend causally from q [rows, num_heads, head_dim], at least one row.

        Returns `out`, of the same shape; by default a new tensor.
        """

    @property
    def queries(self) -> Tensor | None:
        """Return where layers write their queries [rows, num_heads, head_dim]; None: anywhere."""
        return None

    def comparisons(self, device: torch.device) -> Iterable[Comparison]:
        mapping, size = self.slots.mapping, self.spec.page_size
        yield "slots.page_size", self.slots.page_size, size
        yield from tensor_comparisons(
            "slots.mapping", mapping, (self.num_tokens,), torch.int32, device
        )
        if self.spec.check_device_values:
            due = slots_due(self.metadata, size)
            yield from value_comparisons("slots.mapping", mapping, due)

    def check_rows(
        self,
        layer: LayerCache,
        name: str,
        tensor: Tensor,
        shape: Shape,
        dtype: torch.dtype | None = None,  # by default the spec's
    ) -> None:
        """Compare a tensor that a layer is called with; the message names place and layer."""
        dtype, device = dtype or self.spec.dtype, layer.pool.device
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
            found = (tensor.shape, tensor.dtype, tensor.device)
            what = (f"{name} {item}" for item in ("shape", "dtype", "device"))
            compare(zip(what, found, (shape, dtype, device)), self.where(layer))

    def where(self, layer: LayerCache) -> str:
        return f"{self.metadata.place}, layer {layer.layer}"

    @cached_property
    def num_tokens(self) -> int:
        return self.metadata.num_tokens

    @cached_property
    def q_shape(self) -> Shape:
        return self.num_tokens, self.spec.num_heads, self.spec.head_dim

    @cached_property
    def kv_shape(self) -> Shape:
        return self.num_tokens, self.spec.num_kv_heads, self.spec.head_dim

    @cached_property
    def qkv_shape(self) -> Shape:
        heads = self.spec.num_heads + 2 * self.spec.num_kv_heads
        return self.num_tokens, heads, self.spec.head_dim

    @cached_property
    def angle_shape(self) -> Shape:
        return self.num_tokens, 1, self.spec.head_dim // 2

    @cached_property
    def norm_shape(self) -> Shape:
        return self.spec.num_heads + self.spec.num_kv_heads, self.spec.head_dim
