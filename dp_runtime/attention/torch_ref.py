"""Paged attention in plain torch: the CPU default, and the oracle for every other backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.attention.contract import LayerContract
from dp_runtime.attention.query_groups import QueryGroup, QueryPlanner
from dp_runtime.metadata import AttentionMetadata


@dataclass(frozen=True, eq=False)
class TorchRefAttention:
    """Causal GQA over one layer's pool [num_pages, 2, num_kv_heads, page_size, head_dim].

    Computes in float32. The layers of a model share a planner.
    """

    pool: Tensor
    contract: LayerContract
    planner: QueryPlanner

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.contract.check(q, k, v, metadata)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        if metadata.num_tokens == 0:
            return out
        plan = self.planner.plan(metadata)
        self.pool[plan.pages, 0, :, plan.offsets] = k
        self.pool[plan.pages, 1, :, plan.offsets] = v
        for group in plan.groups:
            out[group.rows] = self._attend(q[group.rows], group).to(q.dtype)
        return out

    def _attend(self, q: Tensor, group: QueryGroup) -> Tensor:
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
        blocks = self.pool.view(-1, page_size * head_dim)
        kv = blocks.index_select(0, group.blocks.flatten())
        kv.view(-1, head_dim).index_fill_(0, group.beyond, 0.0)
        kv = kv.view(*group.blocks.shape[:3], -1, head_dim)[..., : group.kv_len, :].float()
        return kv[0], kv[1]
