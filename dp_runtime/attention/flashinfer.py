"""flashinfer's own paged prefill and decode kernels: the second opinion on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dp_runtime.attention.contract import layer_backends
from dp_runtime.attention.kv_write import CacheSlots
from dp_runtime.attention.paged_attention import PagedAttention
from dp_runtime.attention.spec import AttentionSpec, KvScales, LayerBackends, Pools
from dp_runtime.attention.support import check_flashinfer, check_native
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.kernels.builds import JitModule

WORKSPACE_BYTES = 256 << 20
# What flashinfer's two wrappers allocate beside it: 8 MiB of integers each, and KV lengths
WRAPPER_BYTES = 2 * (8 << 20) + 4 * 32768


def check(spec: AttentionSpec, device: torch.device) -> None:
    """ValueError naming the field, and the backend to use instead."""
    check_flashinfer("flashinfer")
    check_native(spec, torch.cuda.get_device_capability(device)[0])


def workspace_bytes(spec: AttentionSpec) -> int:
    """One workspace that prefill and decode share, and what their wrappers add."""
    return WORKSPACE_BYTES + WRAPPER_BYTES


def kernels(spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
    """FA2 for decode, FA2 or FA3 for prefill."""
    from dp_runtime.attention.flashinfer_wrappers import modules

    return modules(spec, device)


def make(spec: AttentionSpec, pools: Pools, scales: Sequence[KvScales]) -> LayerBackends:
    """Backends of all layers, which share wrappers and workspace."""
    from dp_runtime.attention.flashinfer_wrappers import NativePlanner

    planner = NativePlanner(spec, WORKSPACE_BYTES, pools[0].device)
    return layer_backends(
        spec, pools, scales, lambda pool, kv, contract: NativeAttention(pool, kv, contract, planner)
    )


class Planner(Protocol):
    """Plans once a pass and attends in every layer: flashinfer's wrappers, or a test's."""

    def plan(self, metadata: AttentionMetadata) -> CacheSlots: ...

    def run(
        self, q: Tensor, pool: Tensor, scales: KvScales, metadata: AttentionMetadata, out: Tensor
    ) -> None: ...


@dataclass(frozen=True, eq=False)
class NativeAttention(PagedAttention):
    """PagedAttention over flashinfer's wrappers."""

    planner: Planner

    def _slots(self, metadata: AttentionMetadata) -> CacheSlots:
        slots = self.planner.plan(metadata)
        self.contract.check_slots(slots, slots, metadata)
        return slots

    def _attend(self, q: Tensor, metadata: AttentionMetadata) -> Tensor:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.planner.run(q, self.pool, self.scales, metadata, out)
        return out
