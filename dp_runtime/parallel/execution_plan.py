"""ExecutionPlan: how every rank runs a pass, decided once, in the agreement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import NamedTuple, Protocol

from dp_runtime.core.step_program import Pass
from dp_runtime.parallel.buckets import GraphBuckets, PiecewiseBuckets
from dp_runtime.parallel.padding import PaddingPlan, PaddingPolicy


class ExecutionMode(StrEnum):
    GRAPH = auto()  # the whole forward is replayed
    PIECEWISE = auto()  # a rank replays what it has graphs for; all gather as many rows
    EAGER = auto()
    EMPTY = auto()  # no rank has a row: no forward runs


class ExecutionPlan(NamedTuple):
    """Says how a pass runs. NOTE: identical on every rank; never add a per-rank value to it."""

    mode: ExecutionMode
    query_len: int  # rows of each request that decodes; a graph is captured for one
    padding: PaddingPlan  # in GRAPH and PIECEWISE, as many rows are gathered as were captured
    replays_routing: bool = False  # rows bring their experts, which all ranks gather first


class PlansPadding(Protocol):
    def plan(self, real_rows: tuple[int, ...]) -> PaddingPlan:
        """Decide the rows that ranks gather; the same on all of them."""


@dataclass(frozen=True)
class ExecutionPolicy:
    """Plans passes from the ranks' rows and votes; equal on all ranks."""

    padding: PlansPadding = field(default_factory=PaddingPolicy)  # of eager passes
    graphs: Mapping[tuple[Pass, int], GraphBuckets] = field(default_factory=dict)  # by query_len
    piecewise: PiecewiseBuckets = field(default_factory=PiecewiseBuckets)
    counted: bool = False  # in passes from graphs only real rows cross the wire

    def plan(
        self,
        pass_kind: Pass,
        query_len: int,
        real_rows: tuple[int, ...],
        all_fit_graphs: bool,  # every rank has a graph for its rows
    ) -> ExecutionPlan:
        largest = max(real_rows)
        if largest == 0:
            mode, padding = ExecutionMode.EMPTY, self.padding.plan(real_rows)
        elif all_fit_graphs:
            mode = ExecutionMode.GRAPH
            padding = self._bucketed(real_rows, self.graphs[pass_kind, query_len])
        elif self.piecewise.cover(largest):
            mode, padding = ExecutionMode.PIECEWISE, self._bucketed(real_rows, self.piecewise)
        else:
            mode, padding = ExecutionMode.EAGER, self.padding.plan(real_rows)
        return ExecutionPlan(mode, query_len, padding)

    def _bucketed(
        self, real_rows: tuple[int, ...], buckets: GraphBuckets | PiecewiseBuckets
    ) -> PaddingPlan:
        gathered_rows = (buckets.gathered(max(real_rows)),) * len(real_rows)
        return PaddingPlan(real_rows, gathered_rows, self.counted)
