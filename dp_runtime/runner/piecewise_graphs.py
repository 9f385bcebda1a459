"""CUDA graphs of the MoE stages alone, for steps with prefill, whose other shapes are too many.

Launching them kernel by kernel can take the host longer than the GPU runs them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dp_runtime.attention.plan import AttentionPlan
from dp_runtime.core.device_copy import on_device
from dp_runtime.layers.moe import MoeStage
from dp_runtime.models.causal_lm import Hidden, PassInputs
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import PiecewiseBuckets
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.row_exchange import RowExchange, graph_exchange, graph_plan
from dp_runtime.runner.cuda_graph import capture_graph


@dataclass(frozen=True, eq=False)
class _Buffers:
    """All captured stages read and write these."""

    rows: Tensor  # [max_rows, hidden], a stage's input
    sums: Tensor  # [max_rows, hidden], its result
    row_ranges: Tensor  # [2, dp_size] int32: where each rank's rows begin, and how many are real


@dataclass(frozen=True, eq=False)
class CapturedStage(MoeStage):
    """A stage that is replayed; its result is valid until the next stage's."""

    graphs: Mapping[int, torch.cuda.CUDAGraph]  # by gathered rows of a rank
    buffers: _Buffers
    poison: bool

    def __call__(self, x: Tensor, exchange: RowExchange) -> Tensor:
        gathered = exchange.plan.rows_per_rank
        self.buffers.rows[: len(x)].copy_(x)
        if self.poison:
            self.buffers.rows[len(x) : gathered].fill_(float("nan"))
        self.graphs[gathered].replay()
        return self.buffers.sums[: len(x)]


class PiecewiseGraphs:
    """Captures a model's MoE stages, and runs its forward with them; poison: padding is NaN."""

    def __init__(
        self,
        model: PassModel,
        collective: RowCollective,
        buckets: PiecewiseBuckets,
        poison: bool,
        device: torch.device,
    ) -> None:
        self.buckets = buckets
        self._collective = collective
        self._poison = poison
        size = (buckets.max_rows, model.hidden_size)
        rows = torch.zeros(size, dtype=model.dtype, device=device)
        row_ranges = torch.zeros(2, collective.dp_size, dtype=torch.int32, device=device)
        self._buffers = _Buffers(rows, torch.zeros_like(rows), row_ranges)
        self._uncaptured: PassModel = model
        self._model: PassModel = model

    @property
    def count(self) -> int:
        return len(self.buckets.sizes) * self._uncaptured.num_moe_layers

    def capture(self) -> Iterator[None]:
        """Capture every stage at every size, and yield after each, as PassGraphs does."""
        pool = torch.cuda.graph_pool_handle()
        graphs: dict[int, dict[int, torch.cuda.CUDAGraph]] = {}  # by stage, by gathered rows
        for gathered in self.buckets.sizes:
            for stage in self._uncaptured.moe_stages:
                of_stage = graphs.setdefault(id(stage), {})
                of_stage[gathered] = self._capture(stage, gathered, pool)
                yield
        self._model = self._uncaptured.with_stages(
            lambda stage: CapturedStage(
                stage.router,
                stage.experts,
                stage.kernels,
                graphs.get(id(stage), {}),
                self._buffers,
                self._poison,
            )
        )

    def forward(self, inputs: PassInputs, plan: AttentionPlan, exchange: RowExchange) -> Hidden:
        padding = exchange.plan
        self._buffers.row_ranges.copy_(
            on_device(padding.row_ranges, self._buffers.row_ranges.device)
        )
        hidden = self._model.forward(inputs, plan, exchange)
        self._collective.arm_watchdog(f"stages of {padding.rows_per_rank} gathered rows")
        return hidden

    def _capture(self, stage: MoeStage, gathered: int, pool: Any) -> torch.cuda.CUDAGraph:
        size, buffers = self._collective.dp_size, self._buffers
        plan = graph_plan(self._collective, (gathered,) * size, gathered)
        exchange = graph_exchange(plan, self._collective, self._poison, buffers.row_ranges)

        def run() -> None:
            buffers.sums[:gathered].copy_(stage(buffers.rows[:gathered], exchange))

        return capture_graph(run, pool)[0]
