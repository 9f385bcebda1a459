"""PagedAttention: what every backend does around its own kernels, in one layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.attention.contract import LayerContract
from dp_runtime.attention.kv_write import CacheSlots, append, rotate_and_append
from dp_runtime.attention.spec import KvScales
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.core.rotation import QkNormRope


@dataclass(frozen=True, eq=False)
class PagedAttention(ABC):
    """Causal GQA over one layer's pool [num_pages, 2, num_kv_heads, page_size, head_dim].

    A call is checked, its keys and values are appended, and its queries attend.
    """

    pool: Tensor
    scales: KvScales
    contract: LayerContract

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.contract.check(q, k, v, metadata)
        if metadata.num_tokens == 0:
            return torch.empty(q.shape, dtype=q.dtype, device=q.device)
        append(self.pool, self._slots(metadata), k, v, self.scales)
        return self._attend(q, metadata)

    def attend_qkv(self, qkv: Tensor, rotation: QkNormRope, metadata: AttentionMetadata) -> Tensor:
        self.contract.check_qkv(qkv, rotation, metadata)
        if metadata.num_tokens == 0:
            return qkv[:, : self.contract.spec.num_heads]
        slots = self._slots(metadata)
        q = rotate_and_append(self.pool, slots, qkv, rotation, self.scales)
        return self._attend(q, metadata)

    @abstractmethod
    def _slots(self, metadata: AttentionMetadata) -> CacheSlots:
        """Plan a slot, if no layer did, and check the plan: where its rows are appended."""

    @abstractmethod
    def _attend(self, q: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Attend as planned, keys and values of the slot among the others."""
