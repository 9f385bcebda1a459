"""TRT-LLM attention with decodes by our own kernel, wherever it was measured to be faster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.support import one_of
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup
from dp_runtime.attention.trtllm.kernel_plan import TrtllmCalls
from dp_runtime.attention.trtllm.measured import MeasuredTiles
from dp_runtime.kernels.jit_build import JitModule
from dp_runtime.kernels.split_tile import SplitTile

ChooseTile = Callable[[int, int], SplitTile | None]  # by query length and number of requests


@dataclass(frozen=True, eq=False)
class SplitCalls:
    """The calls of an architecture, but for short queries that get a tile."""

    inner: TrtllmCalls
    scale: float
    choose: ChooseTile

    def prefill(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        self.inner.prefill(q, pool, scales, group, out)

    def decode(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        assert group.query_len is not None, "a decode group has one query length"
        tile = self.choose(group.query_len, group.batch_size)
        if tile is None:
            self.inner.decode(q, pool, scales, group, out)
            return
        assert scales == KvScales(), "the kernel reads no quantised cache"
        from dp_runtime.kernels.split_attention import split_attention

        split_attention(q, pool, group.page_table, group.seq_lens, self.scale, out, tile)


class SplitBackend(TrtllmBackend):
    def __init__(
        self,
        spec: AttentionSpec,
        pools: Sequence[Tensor | None],
        scales: Sequence[KvScales] = (),
        calls: TrtllmCalls | None = None,  # by default those of the device's architecture
    ) -> None:
        super().__init__(spec, pools, scales, calls)
        self._calls = SplitCalls(self._calls, spec.head_dim**-0.5, MeasuredTiles.of(spec))

    @classmethod
    def check(cls, spec: AttentionSpec, device: torch.device) -> None:
        super().check(spec, device)
        major = torch.cuda.get_device_capability(device)[0]
        what = f"compute capability 9 (this device has {major})"
        one_of("attention_backend", "split", major == 9, what, "trtllm")

    @classmethod
    def reason(cls, spec: AttentionSpec) -> str:
        tiles = MeasuredTiles.of(spec)
        if not tiles.used:
            shape = f"head_dim {spec.head_dim}, {spec.group_size} query heads a KV head"
            raise ValueError(f"nowhere measured to be faster than XQA ({shape}, {spec.dtypes})")
        return f"measured to be faster than XQA at {tiles}"

    @classmethod
    def workspace_bytes(cls, spec: AttentionSpec) -> int:
        """Count what programs find, too, which every call allocates."""
        parts = (
            row.tile.max_part_bytes(query_len * spec.group_size, spec.num_kv_heads, spec.head_dim)
            for query_len, row in MeasuredTiles.of(spec).used
        )
        return super().workspace_bytes(spec) + max(parts, default=0)

    @classmethod
    def jit_modules(cls, spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
        return super().jit_modules(spec, device) + tuple(
            JitModule(f"Triton attention ({spec.head_dim}, {query_len} rows, {row.tile})",
                      partial(build, spec, query_len, row.tile, device), by_triton=True)
            for query_len, row in MeasuredTiles.of(spec).used
        )  # fmt: skip


def build(spec: AttentionSpec, query_len: int, tile: SplitTile, device: torch.device) -> None:
    """Run the kernels over one request, which compiles them for any number of requests."""
    from dp_runtime.kernels.split_attention import split_attention

    q = torch.zeros(query_len, spec.num_heads, spec.head_dim, dtype=spec.dtype, device=device)
    pool = q.new_zeros(1, 2, spec.num_kv_heads, spec.page_size, spec.head_dim)
    lengths = torch.full((1,), query_len, dtype=torch.int32, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    split_attention(q, pool, table, lengths, spec.head_dim**-0.5, torch.empty_like(q), tile)
