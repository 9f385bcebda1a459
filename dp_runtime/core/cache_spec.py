"""CacheSpec: what a layer keeps of every token or sequence between passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.core.metadata import PageGeometry


@dataclass(frozen=True)
class PagedKv:
    """Keys and values of an attention layer, in pages that requests take as they grow."""

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
        """Return a zeroed pool [num_pages, 2, num_kv_heads, page_size, head_dim] (HND).

        Zeroed, because a masked column still multiplies V by 0, and 0 * NaN is NaN.
        """
        shape = (pages.num_pages, 2, self.num_kv_heads, self.page_size, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=device)


# A model lists one for each of its layers. A kind of layer that keeps something else (a recurrent
# state of fixed shapes for each request) adds its class to this union.
CacheSpec = PagedKv
