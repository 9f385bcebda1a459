"""The TRT-LLM attention kernels through flashinfer: FMHAv2 and XQA on SM90, trtllm-gen on SM100.

This module plans, checks and scatters; it imports no GPU library. The calls of a GPU generation
are beside it, in sm90.py and sm100.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

from dp_runtime.attention.contract import layer_backends
from dp_runtime.attention.kernel_contract import check_kernel, check_plan
from dp_runtime.attention.kernel_groups import KernelGroup, KernelPlanner
from dp_runtime.attention.kv_write import CacheSlots, quantize
from dp_runtime.attention.paged_attention import PagedAttention
from dp_runtime.attention.spec import AttentionSpec, KvScales, LayerBackends, Pools
from dp_runtime.attention.support import check_flashinfer, check_trtllm
from dp_runtime.core.metadata import AttentionMetadata
from dp_runtime.kernels.builds import JitModule

WORKSPACE_BYTES = 128 << 20
GPU_ARCHS = {9: "dp_runtime.attention.sm90", 10: "dp_runtime.attention.sm100"}


class Kernels(Protocol):
    """One GPU generation's calls; each writes out [rows, num_heads, head_dim]."""

    def prefill(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        """Any query lengths, causal; q is of the pool's dtype."""

    def decode(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        """The same short query length for all requests, causal among the new tokens."""


class GpuArch(Protocol):
    """A module with the calls of one GPU generation."""

    def make_kernels(self, spec: AttentionSpec, device: torch.device) -> Kernels: ...

    def modules(self, spec: AttentionSpec) -> tuple[JitModule, ...]: ...


def check(spec: AttentionSpec, device: torch.device) -> None:
    """ValueError naming the field, and the backend to use instead."""
    check_flashinfer("trtllm")
    check_trtllm(spec, torch.cuda.get_device_capability(device)[0])


def workspace_bytes(spec: AttentionSpec) -> int:
    """One workspace for prefill and one for decode: a decode kernel's must stay as it left it."""
    return 2 * WORKSPACE_BYTES


def kernels(spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
    """The modules of the device's generation."""
    return _generation(device).modules(spec)


def make(spec: AttentionSpec, pools: Pools, scales: Sequence[KvScales]) -> LayerBackends:
    """Backends of all layers, which share planner and workspaces."""
    device = pools[0].device
    calls = _generation(device).make_kernels(spec, device)
    return make_layers(spec, pools, scales, calls)


def make_layers(
    spec: AttentionSpec, pools: Pools, scales: Sequence[KvScales], calls: Kernels
) -> LayerBackends:
    """The same over given kernels."""
    planner = KernelPlanner(spec)
    return layer_backends(
        spec,
        pools,
        scales,
        lambda pool, kv, contract: TrtllmAttention(pool, kv, contract, planner, calls),
    )


def _generation(device: torch.device) -> GpuArch:
    major = torch.cuda.get_device_capability(device)[0]
    return cast(GpuArch, import_module(GPU_ARCHS[major]))


@dataclass(frozen=True, eq=False)
class TrtllmAttention(PagedAttention):
    """PagedAttention over the kernels of a GPU generation.

    Over a pool in e4m3 prefill takes q in e4m3 too, with a scale of 1.0 and clamped to 448: the
    kernels take the scale as a host number, so one found in the data would wait for the device, and
    e4m3 keeps the same bits at any magnitude that q has. Decode takes q as it is.
    """

    planner: KernelPlanner
    kernels: Kernels

    def _slots(self, metadata: AttentionMetadata) -> CacheSlots:
        plan = self.planner.plan(metadata)
        check_plan(self.contract, plan, metadata)
        return plan.slots

    def _attend(self, q: Tensor, metadata: AttentionMetadata) -> Tensor:
        plan, seen = self.planner.plan(metadata), self.contract.pass_checks
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in plan.groups:
            in_one_piece = isinstance(group.rows, slice)
            rows = q[group.rows].contiguous()
            target = out[group.rows] if in_one_piece else torch.empty_like(rows)
            if group.query_len is None and self.contract.spec.quantized:
                rows = quantize(rows, 1.0)
            if plan is not seen.kernel_plan:
                check_kernel(self.contract, rows, target, group, metadata)
            call = self.kernels.decode if group.query_len else self.kernels.prefill
            call(rows, self.pool, self.scales, group, target)
            if not in_one_piece:
                out[group.rows] = target
        seen.kernel_plan = plan
        return out
