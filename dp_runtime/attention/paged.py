"""Writing new keys and values into a paged pool."""

from __future__ import annotations

from torch import Tensor

from dp_runtime.metadata import AttentionMetadata


def append(pool: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> None:
    """k and v [rows, num_kv_heads, head_dim] go to where the metadata says.

    pool [num_pages, 2, num_kv_heads, page_size, head_dim].
    """
    pages, offsets = metadata.slot_mapping // pool.shape[3], metadata.slot_mapping % pool.shape[3]
    pool[pages, 0, :, offsets] = k.to(pool.dtype)
    pool[pages, 1, :, offsets] = v.to(pool.dtype)
