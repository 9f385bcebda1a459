"""AttentionBackend: plans a pass once, and runs it in each layer of a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dp_runtime.attention.contract import compare, metadata_comparisons
from dp_runtime.attention.plan import AttentionPlan, CacheSlots, LayerCache
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.kernels.jit_build import JitModule


@dataclass(frozen=True, eq=False)
class PagedAttention:
    """Causal grouped-query attention over one layer's pages, which already have the new keys."""

    cache: LayerCache

    def run(self, q: Tensor, plan: AttentionPlan, out: Tensor | None = None) -> Tensor:
        """Attend from q [rows, num_heads, head_dim] as planned; returns `out`, of that shape too.

        out: by default a new tensor.
        """
        plan.check_rows(self.cache, "q", q, plan.q_shape)
        if out is not None:
            plan.check_rows(self.cache, "out", out, plan.q_shape)
        return plan.attend(q, self.cache, out) if plan.num_tokens else q


class AttentionBackend(ABC):
    """Attention of all layers of a model over their page pools, which share its workspaces.

    It knows no batch, agreement or config. A class imports its GPU library only in __init__, so
    that `check` and the byte counts work without it.
    """

    capturable: ClassVar[bool]  # a plan serves a graph, whose lengths change on the device

    def __init__(
        self,
        spec: AttentionSpec,
        pools: Sequence[Tensor | None],  # [layer]; None: the layer does not attend
        scales: Sequence[KvScales] = (),  # [layer], or all 1.0
    ) -> None:
        self.spec = spec
        self._caches = {
            layer: LayerCache(layer, pool, scale)
            for layer, (pool, scale) in enumerate(
                zip(pools, scales or [KvScales()] * len(pools), strict=True)
            )
            if pool is not None
        }
        assert self._caches, "no layer attends"
        self._last_layer = max(self._caches)
        self.device = self._caches[self._last_layer].pool.device

    @classmethod
    @abstractmethod
    def check(cls, spec: AttentionSpec, device: torch.device) -> None:
        """Raise ValueError for what its kernels do not support, with field and alternative."""

    @classmethod
    def reason(cls, spec: AttentionSpec) -> str:
        """Say why auto takes it for a spec that it serves; ValueError says why it does not."""
        return "its kernels serve this model on this device"

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec) -> int:  # whatever the number of layers
        return 0

    @classmethod
    def jit_modules(cls, spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
        """List what must be compiled before the spec can be served."""
        return ()

    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero pages of all layers: a masked column is 0 * V, and 0 * NaN would be NaN."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        for cache in self._caches.values():
            cache.pool.view(torch.uint8).index_fill_(0, index, 0)

    def layer(self, index: int) -> PagedAttention:
        return PagedAttention(self._caches[index])

    def plan(self, metadata: AttentionMetadata) -> AttentionPlan:
        """Plan a pass for all layers; ContractViolation for anything a kernel would misread."""
        where = f"{metadata.place}, layers 0..{self._last_layer}"
        compare(metadata_comparisons(metadata, self.spec, self.device), where)
        plan = self._plan(metadata) if metadata.num_tokens else self._plan_no_rows(metadata)
        compare(plan.comparisons(self.device), where)
        return plan

    @abstractmethod
    def _plan(self, metadata: AttentionMetadata) -> AttentionPlan:
        """Plan a pass that has rows and was checked."""

    def _plan_no_rows(self, metadata: AttentionMetadata) -> AttentionPlan:
        return _NoRows(metadata, self._slots(metadata), self.spec)

    def _slots(self, metadata: AttentionMetadata) -> CacheSlots:
        return CacheSlots(metadata.slot_mapping, self.spec.page_size)


class _NoRows(AttentionPlan):
    def attend(self, q: Tensor, cache: LayerCache, out: Tensor | None = None) -> Tensor:
        raise AssertionError("a pass without rows calls no kernel")
