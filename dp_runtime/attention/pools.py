"""The page pools that attention backends read and append to."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.metadata import PageGeometry


def allocate_pools(
    num_layers: int, pages: PageGeometry, spec: AttentionSpec, device: torch.device
) -> list[Tensor]:
    """One zeroed pool per layer, [num_pages, 2, num_kv_heads, page_size, head_dim] (HND).

    Zeroed, because a masked column still multiplies V by 0, and 0 * NaN is NaN.
    """
    shape = (pages.num_pages, 2, spec.num_kv_heads, spec.page_size, spec.head_dim)
    return [torch.zeros(shape, dtype=spec.kv_dtype, device=device) for _ in range(num_layers)]
