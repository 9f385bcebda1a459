"""Ranks whose decodes and verifications attend by our own kernel instead of XQA."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_plan import TrtllmCalls
from dp_runtime.attention.trtllm.split import ChooseTile, SplitCalls
from dp_runtime.kernels.split_tile import MAX_REQUESTS, SplitTile
from examples.benchmarks.harness.stepping import SteppedRank


@dataclass(frozen=True)
class Always:
    """Chooses one tile for whatever the kernel serves."""

    tile: SplitTile

    def __call__(self, query_len: int, requests: int) -> SplitTile | None:
        return self.tile if requests <= MAX_REQUESTS else None


def attend_by(rank: SteppedRank, tile: SplitTile | None) -> None:
    """Have a rank's models attend so from now on, None: by XQA, and capture what that changes.

    All ranks call it at the same time.
    """
    changed = False
    for model in {runner.model for runner in rank.loop.runner.passes.values()}:
        backend = model.backend
        assert isinstance(backend, TrtllmBackend), f"{backend} has no calls to replace"
        calls: TrtllmCalls = backend._calls
        found: ChooseTile | None = None
        if isinstance(calls, SplitCalls):
            found, calls = calls.choose, calls.inner
        choose = None if tile is None else Always(tile)
        if choose != found:
            scale = backend.spec.head_dim**-0.5
            backend._calls = calls if choose is None else SplitCalls(calls, scale, choose)
            changed = True
    if changed:
        rank.capture()
