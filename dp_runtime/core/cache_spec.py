"""CacheSpec: what a layer keeps of a request between passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import PageGeometry


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
        if device.type != "cpu" or not pages.num_pages:
            return torch.zeros(shape, dtype=self.dtype, device=device)
        # The host gives a page of its memory, zeroed, when it is first touched; torch touches all.
        zeroed = np.zeros(pages.num_pages * self.page_bytes, np.uint8)
        return torch.from_numpy(zeroed).view(self.dtype).view(shape)


CacheSpec = PagedKv  # one a layer; a layer with a recurrent state would add a class to this union
