"""TRT-LLM attention through flashinfer: FMHAv2 and XQA on SM90, trtllm-gen on SM100."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.support import check_flashinfer, check_trtllm
from dp_runtime.attention.trtllm.kernel_groups import build_groups
from dp_runtime.attention.trtllm.kernel_plan import KernelPlan, TrtllmCalls
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.kernels.jit_build import JitModule

WORKSPACE_BYTES = 128 << 20
GPU_ARCHS = {9: "dp_runtime.attention.trtllm.sm90", 10: "dp_runtime.attention.trtllm.sm100"}


class GpuArch(Protocol):  # the module of an architecture
    def make_calls(self, spec: AttentionSpec, device: torch.device) -> TrtllmCalls: ...

    def jit_modules(self, spec: AttentionSpec) -> tuple[JitModule, ...]: ...


class TrtllmBackend(AttentionBackend):
    """Serves short queries by a decode kernel, all others by prefill; imports no GPU library."""

    capturable: ClassVar[bool] = True

    def __init__(
        self,
        spec: AttentionSpec,
        pools: Sequence[Tensor | None],
        scales: Sequence[KvScales] = (),
        calls: TrtllmCalls | None = None,  # by default those of the device's architecture
    ) -> None:
        super().__init__(spec, pools, scales)
        self._calls = calls or _arch(self.device).make_calls(spec, self.device)

    @classmethod
    def check(cls, spec: AttentionSpec, device: torch.device) -> None:
        check_flashinfer("trtllm")
        check_trtllm(spec, torch.cuda.get_device_capability(device)[0])

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec) -> int:
        """Count one for prefill and one for decode, which must stay as its kernel left it."""
        return 2 * WORKSPACE_BYTES

    @classmethod
    def jit_modules(cls, spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
        return _arch(device).jit_modules(spec)

    def _plan(self, metadata: AttentionMetadata) -> KernelPlan:
        groups = build_groups(metadata, self.spec.decode_query_lens)
        return KernelPlan(metadata, self._slots(metadata), self.spec, groups, self._calls)


def _arch(device: torch.device) -> GpuArch:
    major = torch.cuda.get_device_capability(device)[0]
    return cast(GpuArch, import_module(GPU_ARCHS[major]))
