"""flashinfer's own paged prefill and decode kernels: the second opinion on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from dp_runtime.attention.contract import LayerContract
from dp_runtime.attention.paged import append
from dp_runtime.metadata import AttentionMetadata

WORKSPACE_BYTES = 256 << 20


class NativePlanner:
    """Plans flashinfer's wrapper for a metadata once, for all layers that share the planner."""

    def __init__(self, heads: LayerContract, pool: Tensor) -> None:
        workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=pool.device)
        self._heads = heads
        self._page_size = pool.shape[3]
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        self._decode = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        self._planned: AttentionMetadata | None = None

    def run(self, q: Tensor, pool: Tensor, metadata: AttentionMetadata, out: Tensor) -> None:
        decoding = bool((metadata.query_lens_host == 1).all())
        if self._planned is not metadata:
            (self._plan_decode if decoding else self._plan_prefill)(metadata)
            self._planned = metadata
        (self._decode if decoding else self._prefill).run(q, pool, out=out)

    def _plan_prefill(self, metadata: AttentionMetadata) -> None:
        heads = self._heads
        self._prefill.plan(
            metadata.cu_seqlens_q,
            *self._pages(metadata),
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self._page_size,
            causal=True,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
        )

    def _plan_decode(self, metadata: AttentionMetadata) -> None:
        heads = self._heads
        self._decode.plan(
            *self._pages(metadata),
            heads.num_heads,
            heads.num_kv_heads,
            heads.head_dim,
            self._page_size,
            q_data_type=heads.dtype,
            kv_data_type=heads.dtype,
        )

    def _pages(self, metadata: AttentionMetadata) -> tuple[Tensor, Tensor, Tensor]:
        """indptr [requests + 1], page ids [pages in use], tokens in each last page; int32."""
        size = self._page_size
        counts = -(-metadata.seq_lens_host // size)
        table = metadata.page_table_host
        used = np.arange(table.shape[1]) < counts[:, None]
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        last = (metadata.seq_lens_host - (counts - 1) * size).astype(np.int32)
        device = metadata.seq_lens.device
        indices, pointers, lengths = (torch.from_numpy(a) for a in (table[used], indptr, last))
        return pointers.to(device), indices.to(device), lengths.to(device)


@dataclass(frozen=True, eq=False)
class NativeAttention:
    """Causal GQA over one layer's pool [num_pages, 2, num_kv_heads, page_size, head_dim]."""

    pool: Tensor
    contract: LayerContract
    planner: NativePlanner

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.contract.check(q, k, v, metadata)
        out = torch.empty_like(q)
        if metadata.num_tokens:
            append(self.pool, k, v, metadata)
            self.planner.run(q, self.pool, metadata, out)
        return out
