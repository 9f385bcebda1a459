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


@dataclass(frozen=True)
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


def attend_by(rank: SteppedRank, tile: SplitTile | None, layout: str) -> None:
    """Have a rank's models attend so from now on, None: by XQA, and capture what that changes.

    All ranks call it at the same time. layout: of the graphs, as `SteppedRank.lay_out` takes it.
    """
    changed = False
    for model in {runner.model for runner in rank.loop.runner.passes.values()}:
        backend = model.backend
        assert isinstance(backend, TrtllmBackend), f"{backend} has no calls to replace"
        calls = backend._calls.inner if isinstance(backend._calls, SplitCalls) else backend._calls
        chosen = calls if tile is None else SplitCalls(calls, backend.spec.head_dim**-0.5, tile)
        changed |= chosen != backend._calls
        backend._calls = chosen
    if changed:
        rank.capture(layout=layout)
    else:
        rank.lay_out(layout)
