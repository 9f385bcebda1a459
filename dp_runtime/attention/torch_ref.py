"""Paged attention in plain torch: the CPU default, and the oracle for every other backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.attention.contract import layer_backends
from dp_runtime.attention.kv_write import CacheSlots
from dp_runtime.attention.paged_attention import PagedAttention
from dp_runtime.attention.query_groups import QueryGroup, QueryPlanner
from dp_runtime.attention.spec import AttentionSpec, KvScales, LayerBackends, Pools
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.kernels.builds import JitModule


def check(spec: AttentionSpec, device: torch.device) -> None:
    """Serves every spec on every device."""


def workspace_bytes(spec: AttentionSpec) -> int:
    """Allocates nothing that lasts."""
    return 0


def kernels(spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
    """Compiles nothing."""
    return ()


def make(spec: AttentionSpec, pools: Pools, scales: Sequence[KvScales]) -> LayerBackends:
    """Backends of all layers, which share a planner."""
    planner = QueryPlanner(spec.num_kv_heads, spec.page_size)
    return layer_backends(
        spec,
        pools,
        scales,
        lambda pool, kv, contract: TorchRefAttention(pool, kv, contract, planner),
    )


@dataclass(frozen=True, eq=False)
class TorchRefAttention(PagedAttention):
    """PagedAttention in float32, over a cache in e4m3 too.

    The layers of a model share a planner.
    """

    planner: QueryPlanner

    def _slots(self, metadata: AttentionMetadata) -> CacheSlots:
        plan = self.planner.plan(metadata)
        self.contract.check_slots(plan, plan.slots, metadata)
        return plan.slots

    def _attend(self, q: Tensor, metadata: AttentionMetadata) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in self.planner.plan(metadata).groups:
            out[group.rows] = self._attend_group(q[group.rows], group).to(q.dtype)
        return out

    def _attend_group(self, q: Tensor, group: QueryGroup) -> Tensor:
        """q [pieces, query_len, num_heads, head_dim], to the same shape in float32."""
        pieces, query_len, num_heads, head_dim = q.shape
        k, v = self._gather(group)
        kv_heads = k.shape[1]
        # Query heads that share a KV head become rows beside each other: no KV head is repeated.
        folded = q.float().view(pieces, query_len, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
        mask = group.mask
        if mask is not None and query_len > 1:
            mask = mask.repeat(1, 1, num_heads // kv_heads, 1)
        out = F.scaled_dot_product_attention(folded.flatten(2, 3), k, v, attn_mask=mask)
        out = out.view(pieces, kv_heads, -1, query_len, head_dim)
        return out.permute(0, 3, 1, 2, 4).flatten(2, 3)

    def _gather(self, group: QueryGroup) -> tuple[Tensor, Tensor]:
        """K and V of the group's pages, each [pieces, num_kv_heads, kv_len, head_dim] float32.

        Positions beyond a sequence become 0: they are masked, but 0 * NaN would be NaN.
        """
        page_size, head_dim = self.pool.shape[3:]
        quantized = self.contract.spec.quantized
        stored = self.pool.view(torch.uint8) if quantized else self.pool
        kv = stored.view(-1, page_size * head_dim).index_select(0, group.blocks.flatten())
        kv.view(-1, head_dim).index_fill_(0, group.beyond, 0)  # NOTE: zero is 0 in e4m3 too
        kv = kv.view(*group.blocks.shape[:3], -1, head_dim)[..., : group.kv_len, :]
        if quantized:
            k, v = kv.view(self.pool.dtype).float()
            return k * self.scales.k, v * self.scales.v
        kv = kv.float()
        return kv[0], kv[1]
