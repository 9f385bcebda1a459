"""How far a rank is before it serves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dp_runtime.kernels.jit_build import JitModule, KernelBuilds
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.startup.loaded_rank import LoadedRank


@dataclass(eq=False)
class StartProgress:
    """Tells how far a rank is before it serves: its start writes, `health` reads meanwhile."""

    state: RankState = RankState.STARTING
    bytes_loaded: int = 0
    builds: KernelBuilds | None = None
    graphs_captured: int = 0
    graphs_total: int = 0

    def add_bytes(self, count: int) -> None:
        self.bytes_loaded += count

    def load(
        self, modules: Sequence[JitModule], device: torch.device, load: Callable[[], LoadedRank]
    ) -> LoadedRank:
        """Build kernels while weights are loaded."""
        self.state, self.bytes_loaded = RankState.LOADING, 0
        self.builds = KernelBuilds(modules, device)
        with self.builds as builds:
            rank = load()
            self.state = RankState.COMPILING
            builds.wait()
        self.state = RankState.READY
        return rank

    def count_graphs(self, captured: int, total: int) -> None:
        self.graphs_captured, self.graphs_total = captured, total

    def describe(self, health: RankHealth) -> RankHealth:
        return replace(
            health,
            state=self.state,
            bytes_loaded=self.bytes_loaded,
            kernels_built=self.builds.num_built if self.builds else 0,
            kernels_total=self.builds.total if self.builds else 0,
            graphs_captured=self.graphs_captured,
            graphs_total=self.graphs_total,
        )
