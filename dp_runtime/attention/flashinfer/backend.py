"""flashinfer's own paged prefill and decode kernels: the second opinion on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.plan import AttentionPlan, LayerCache
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.support import check_flashinfer, check_native
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.kernels.jit_build import JitModule

WORKSPACE_BYTES = 256 << 20  # shared by the two wrappers
WRAPPER_BYTES = 2 * (8 << 20) + 4 * 32768  # 8 MiB of integers in each wrapper, and KV lengths


class Wrappers(Protocol):
    """flashinfer's wrappers, or a test's; they keep only the last plan."""

    def plan(self, metadata: AttentionMetadata) -> None: ...

    def run(
        self,
        q: Tensor,
        pool: Tensor,
        scales: KvScales,
        metadata: AttentionMetadata,
        out: Tensor,
    ) -> None: ...


class FlashinferBackend(AttentionBackend):
    capturable: ClassVar[bool] = False  # planned on the host, with exact lengths

    def __init__(
        self, spec: AttentionSpec, pools: Sequence[Tensor | None], scales: Sequence[KvScales] = ()
    ) -> None:
        from dp_runtime.attention.flashinfer.wrappers import PagedWrappers

        super().__init__(spec, pools, scales)
        self._wrappers: Wrappers = PagedWrappers(spec, WORKSPACE_BYTES, self.device)

    @classmethod
    def check(cls, spec: AttentionSpec, device: torch.device) -> None:
        check_flashinfer("flashinfer")
        check_native(spec, torch.cuda.get_device_capability(device)[0])

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec) -> int:
        return WORKSPACE_BYTES + WRAPPER_BYTES

    @classmethod
    def jit_modules(cls, spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
        from dp_runtime.attention.flashinfer.wrappers import jit_modules

        return jit_modules(spec, device)

    def _plan(self, metadata: AttentionMetadata) -> FlashinferPlan:
        self._wrappers.plan(metadata)
        return FlashinferPlan(metadata, self._slots(metadata), self.spec, self._wrappers)


@dataclass(frozen=True, eq=False)
class FlashinferPlan(AttentionPlan):
    """Attends by the wrappers, until they plan another pass."""

    wrappers: Wrappers

    def attend(self, q: Tensor, cache: LayerCache, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(q) if out is None else out
        self.wrappers.run(q, cache.pool, cache.scales, self.metadata, out)
        return out
