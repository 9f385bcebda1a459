"""Ranks whose decodes and verifications attend by our own kernel instead of XQA."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dp_runtime.attention.spec import KvScales
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup
from dp_runtime.attention.trtllm.kernel_plan import TrtllmCalls
from dp_runtime.kernels.split_attention import SplitTile, split_attention
from examples.benchmarks.harness.stepping import SteppedRank


@dataclass(frozen=True, eq=False)
class SplitCalls:
    """The calls of an architecture but for those of short queries."""

    inner: TrtllmCalls
    scale: float
    tile: SplitTile

    def prefill(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        self.inner.prefill(q, pool, scales, group, out)

    def decode(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        assert scales == KvScales(), "the kernel reads no quantised cache"
        split_attention(
            q, pool, group.page_table, group.seq_lens, group.max_seq_len, self.scale, out, self.tile
        )


def attend_by(rank: SteppedRank, tile: SplitTile, layout: str) -> None:
    """Have all models of a rank attend so from now on, also in new graphs; all ranks call it."""
    for model in {runner.model for runner in rank.loop.runner.passes.values()}:
        backend = model.backend
        assert isinstance(backend, TrtllmBackend), f"{backend} has no calls to replace"
        backend._calls = SplitCalls(backend._calls, backend.spec.head_dim**-0.5, tile)
    rank.capture(packed=layout == "packed")
