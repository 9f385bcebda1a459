"""What every eager attention call must satisfy; kernels themselves check none of it.

Values (page ids, lengths, offsets) are checked once per slot when the metadata is built; here
shapes and dtypes are compared at each call, without a device synchronisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.errors import ContractViolation
from dp_runtime.metadata import AttentionMetadata


@dataclass(frozen=True)
class LayerContract:
    """The shapes and dtypes that fit one layer's pool."""

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: int, num_heads: int, pool: Tensor) -> LayerContract:
        """The contract of a pool [num_pages, 2, num_kv_heads, page_size, head_dim]."""
        return cls(layer, num_heads, pool.shape[2], pool.shape[4], pool.dtype)

    def check(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> None:
        """Compare a call with its metadata; ContractViolation names place, layer and numbers."""
        rows, requests = metadata.num_tokens, metadata.batch_size
        kv_shape = (rows, self.num_kv_heads, self.head_dim)
        expected = (
            ("q shape", tuple(q.shape), (rows, self.num_heads, self.head_dim)),
            ("k shape", tuple(k.shape), kv_shape),
            ("v shape", tuple(v.shape), kv_shape),
            ("q dtype", q.dtype, self.dtype),
            ("k dtype", k.dtype, self.dtype),
            ("v dtype", v.dtype, self.dtype),
            ("cu_seqlens_q rows", metadata.cu_seqlens_q.shape[0], requests + 1),
            ("seq_lens rows", metadata.seq_lens.shape[0], requests),
            ("page_table rows", metadata.page_table.shape[0], requests),
            ("query_lens rows", len(metadata.query_lens_host), requests),
        )
        for what, found, due in expected:
            self.same(what, found, due, metadata)

    def same(self, what: str, found: object, due: object, metadata: AttentionMetadata) -> None:
        if found != due:
            raise ContractViolation(
                f"{metadata.place}, layer {self.layer}: {what} is {found}, "
                f"the metadata and the pool say {due}"
            )
