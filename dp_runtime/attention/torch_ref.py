"""Paged attention in plain torch: the CPU default, and the oracle for every other backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.plan import AttentionPlan, LayerCache
from dp_runtime.attention.query_groups import QueryGroup, build_groups
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.core.e4m3 import E4M3


class TorchRefBackend(AttentionBackend):
    capturable: ClassVar[bool] = False

    @classmethod
    def check(cls, spec: AttentionSpec, device: torch.device) -> None:
        """Refuse nothing."""

    def _plan(self, metadata: AttentionMetadata) -> QueryPlan:
        groups = build_groups(metadata, self.spec.num_kv_heads, self.spec.page_size)
        return QueryPlan(metadata, self._slots(metadata), self.spec, groups)


@dataclass(frozen=True, eq=False)
class QueryPlan(AttentionPlan):
    """Attends group by group, each in one batched product, in float32 over any cache."""

    groups: tuple[QueryGroup, ...]

    def attend(self, q: Tensor, cache: LayerCache, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(q) if out is None else out
        for group in self.groups:
            out[group.rows] = _attend_group(q[group.rows], group, cache).to(q.dtype)
        return out


def _attend_group(q: Tensor, group: QueryGroup, cache: LayerCache) -> Tensor:
    """Attend from q [pieces, query_len, num_heads, head_dim]; the same shape in float32."""
    pieces, query_len, num_heads, head_dim = q.shape
    k, v = _gather(group, cache)
    kv_heads = k.shape[1]
    # Query heads that share a KV head become rows of one product: no KV head is repeated.
    folded = q.float().view(pieces, query_len, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4)
    mask = group.mask
    if mask is not None and query_len > 1:
        mask = mask.repeat(1, 1, num_heads // kv_heads, 1)
    out = F.scaled_dot_product_attention(folded.flatten(2, 3), k, v, attn_mask=mask)
    out = out.view(pieces, kv_heads, -1, query_len, head_dim)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _gather(group: QueryGroup, cache: LayerCache) -> tuple[Tensor, Tensor]:
    """Return k and v of a group, each [pieces, num_kv_heads, kv_len, head_dim] float32."""
    pool, scales = cache.pool, cache.scales
    page_size, head_dim = pool.shape[3:]
    quantized = pool.dtype == E4M3
    stored = pool.view(torch.uint8) if quantized else pool
    kv = stored.view(-1, page_size * head_dim).index_select(0, group.blocks.flatten())
    # NOTE: what is beyond a sequence is masked, but 0 * NaN would be NaN; zero is 0 in e4m3 too.
    kv.view(-1, head_dim).index_fill_(0, group.beyond, 0)
    kv = kv.view(*group.blocks.shape[:3], -1, head_dim)[..., : group.kv_len, :]
    if quantized:
        k, v = kv.view(pool.dtype).float()
        return k * scales.k, v * scales.v
    kv = kv.float()
    return kv[0], kv[1]
