"""KernelPlan: a pass's groups of requests, and the kernel calls that serve them in each layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dp_runtime.attention.contract import Comparison, compare
from dp_runtime.attention.plan import AttentionPlan, LayerCache
from dp_runtime.attention.spec import KvScales
from dp_runtime.attention.trtllm.kernel_contract import group_comparisons, members_comparisons
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup
from dp_runtime.core.e4m3 import quantize

CALL = tuple(f"a kernel's {name}" for name in (
    "q shape", "out shape", "q dtype", "out dtype", "q contiguity", "out contiguity"
))  # fmt: skip


class TrtllmCalls(Protocol):
    """The kernel calls of one GPU architecture; each writes out [rows, num_heads, head_dim]."""

    def prefill(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        """Attend causally with any query lengths; q is of the pool's dtype."""

    def decode(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        """Attend causally with one short query length; q is of the model's dtype."""


@dataclass(frozen=True, eq=False)
class KernelPlan(AttentionPlan):
    """Attends group by group; a captured graph keeps it, as each replay reads its tensors."""

    groups: tuple[KernelGroup, ...]
    calls: TrtllmCalls

    def attend(self, q: Tensor, cache: LayerCache, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(q) if out is None else out
        for group in self.groups:
            in_one_piece = isinstance(group.rows, slice)
            rows = q[group.rows].contiguous()
            target = out[group.rows] if in_one_piece else torch.empty_like(rows)
            if group.query_len is None and self.spec.quantized:
                # The kernel takes q's scale as a host number: one found in the data would wait for
                # the device, and e4m3 keeps the same bits at any magnitude that q has.
                rows = quantize(rows, 1.0)
            self.check_call(rows, target, group, cache)
            call = self.calls.decode if group.query_len else self.calls.prefill
            call(rows, cache.pool, cache.scales, group, target)
            if not in_one_piece:
                out[group.rows] = target
        return out

    def check_call(self, q: Tensor, out: Tensor, group: KernelGroup, cache: LayerCache) -> None:
        """Compare q and out, from which a kernel takes its batch and its dtype."""
        spec = self.spec
        dtype = spec.kv_dtype if group.query_len is None else spec.dtype
        shape = (group.num_rows, spec.num_heads, spec.head_dim)
        found = (q.shape, out.shape, q.dtype, out.dtype, q.is_contiguous(), out.is_contiguous())
        due = (shape, shape, dtype, spec.dtype, True, True)
        if found != due:
            compare(zip(CALL, found, due), self.where(cache))

    def comparisons(self, device: torch.device) -> Iterable[Comparison]:
        yield from super().comparisons(device)
        yield from members_comparisons(self.groups, self.metadata)
        for group in self.groups:
            yield from group_comparisons(group, self.metadata, self.spec, device)
