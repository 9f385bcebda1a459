"""Writing new keys and values into a paged pool."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dp_runtime.attention.spec import KvScales
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.core.rotation import QkNormRope

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


@dataclass(frozen=True, eq=False)
class CacheSlots:
    """Where a pass's new keys and values go; the same in every layer."""

    mapping: Tensor  # [rows] int32: page * page_size + offset
    page_size: int

    @classmethod
    def of(cls, metadata: AttentionMetadata, page_size: int) -> CacheSlots:
        return cls(metadata.slot_mapping, page_size)

    @cached_property
    def pages(self) -> Tensor:
        """[rows] int64; kernels of a GPU work with the mapping alone."""
        return self.mapping.long() // self.page_size

    @cached_property
    def offsets(self) -> Tensor:
        """[rows] int64, within the pages."""
        return self.mapping.long() % self.page_size


def quantize(x: Tensor, scale: float) -> Tensor:
    """x / scale as float8_e4m3fn; what lies beyond its range becomes its largest value."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def append(pool: Tensor, slots: CacheSlots, k: Tensor, v: Tensor, scales: KvScales) -> None:
    """k and v [rows, num_kv_heads, head_dim] go to their slots, quantised if the pool is e4m3.

    pool [num_pages, 2, num_kv_heads, page_size, head_dim].
    """
    if pool.dtype == E4M3:
        stored = (quantize(k, scales.k), quantize(v, scales.v))
        k, v = (tensor.view(torch.uint8) for tensor in stored)
    pool = _storable(pool)
    if pool.is_cuda:
        from dp_runtime.kernels.kv_append import append_rows

        append_rows(pool, slots.mapping, k, v)
        return
    pool[slots.pages, 0, :, slots.offsets] = k
    pool[slots.pages, 1, :, slots.offsets] = v


def rotate_and_append(
    pool: Tensor, slots: CacheSlots, qkv: Tensor, rotation: QkNormRope, scales: KvScales
) -> Tensor:
    """Norm, rotate and append rows that no one has rotated yet, in one kernel on a GPU.

    qkv [rows, num_heads + 2 * num_kv_heads, head_dim] -> q [rows, num_heads, head_dim].
    """
    from dp_runtime.kernels import kv_append as triton_append

    bytes_or_values = _storable(pool)
    return triton_append.rotate_and_append(
        bytes_or_values, slots.mapping, qkv, rotation, scales.k, scales.v
    )


def _storable(pool: Tensor) -> Tensor:
    """A pool in e4m3 as bytes, which every device can scatter."""
    return pool.view(torch.uint8) if pool.dtype == E4M3 else pool
