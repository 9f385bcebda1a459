"""CacheSpec: what a layer keeps of a request between passes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import PageGeometry

Shape = tuple[int, ...]


class LayerState(tuple[Tensor, ...]):
    """The recurrent states of one layer, [num_slots, *shape] each; no weights, though a layer's."""

    __slots__ = ()


@dataclass(frozen=True)
class PagedKv:
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        return self._page_numel * self.dtype.itemsize

    @property
    def _page_numel(self) -> int:
        return 2 * self.num_kv_heads * self.page_size * self.head_dim

    def allocate(self, pages: PageGeometry, device: torch.device) -> Tensor:
        """Return a zeroed pool, for a masked column still multiplies V by 0, and 0 * NaN is NaN."""
        shape = (pages.num_pages, 2, self.num_kv_heads, self.page_size, self.head_dim)  # HND
        return _zeros(shape, self.dtype, device)


@dataclass(frozen=True)
class RecurrentState:
    """Tensors of a fixed size for each request, whatever its length."""

    shapes: tuple[Shape, ...]  # of each tensor, for one request
    dtypes: tuple[torch.dtype, ...]

    def __post_init__(self) -> None:
        assert len(self.shapes) == len(self.dtypes), "one dtype per tensor"

    @property
    def slot_bytes(self) -> int:
        tensors = zip(self.shapes, self.dtypes)
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in tensors)

    def allocate(self, num_slots: int, device: torch.device) -> LayerState:
        """Return zeroed states; slot 0 belongs to nobody, for rows that are no request's."""
        tensors = zip(self.shapes, self.dtypes)
        return LayerState(_zeros((num_slots, *shape), dtype, device) for shape, dtype in tensors)


CacheSpec = PagedKv | RecurrentState  # one a layer


@dataclass(frozen=True, eq=False)
class LayerCaches:
    """The memory of the caches that a model lists, [layer]."""

    pools: tuple[Tensor | None, ...]  # None: the layer has no pages
    states: tuple[LayerState, ...]  # without tensors: the layer has no state

    @classmethod
    def allocate(
        cls,
        specs: Sequence[CacheSpec],
        pages: PageGeometry,
        num_state_slots: int,
        device: torch.device,
    ) -> LayerCaches:
        pools, states = list[Tensor | None](), list[LayerState]()
        for spec in specs:
            match spec:
                case PagedKv():
                    pools.append(spec.allocate(pages, device))
                    states.append(LayerState())
                case RecurrentState():
                    pools.append(None)
                    states.append(spec.allocate(num_state_slots, device))
        return cls(tuple(pools), tuple(states))


def page_bytes(specs: Sequence[CacheSpec]) -> int:
    """Count the bytes of one page over all layers that have pages."""
    return sum(spec.page_bytes for spec in specs if isinstance(spec, PagedKv))


def slot_bytes(specs: Sequence[CacheSpec]) -> int:
    """Count the bytes of one request's state over all layers that have one."""
    return sum(spec.slot_bytes for spec in specs if isinstance(spec, RecurrentState))


def _zeros(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    numel = math.prod(shape)
    if device.type != "cpu" or not numel:
        return torch.zeros(shape, dtype=dtype, device=device)
    # The host gives a page of its memory, zeroed, when it is first touched; torch touches all.
    return torch.from_numpy(np.zeros(numel * dtype.itemsize, np.uint8)).view(dtype).view(shape)
