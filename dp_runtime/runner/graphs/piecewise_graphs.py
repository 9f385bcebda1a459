"""CUDA graphs for passes in which some rank prefills: forwards in pieces, and single MoE stages.

Launching them kernel by kernel can take the host longer than the GPU runs them. What pieces don't
cover, as a prompt's images, is launched, but for its stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.core.device_copy import on_device
from dp_runtime.layers.moe import MoeStage
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import PiecewiseBuckets
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.row_exchange import RowExchange, graph_exchange
from dp_runtime.runner.graphs.cuda_graph import GraphMemory, capture_graph
from dp_runtime.runner.graphs.forward_pieces import ForwardPieces


@dataclass(frozen=True, eq=False)
class StageRows:
    """All captured stages read and write these."""

    rows: Tensor  # [max_rows, hidden], a stage's input
    sums: Tensor  # [max_rows, hidden], its result
    row_ranges: Tensor  # [2, dp_size] int32: where each rank's rows begin, and how many are real


@dataclass(frozen=True, eq=False)
class CapturedStage(MoeStage):
    """A stage that is replayed; its result is valid until the next stage's."""

    graphs: Mapping[int, torch.cuda.CUDAGraph]  # by gathered rows of a rank
    buffers: StageRows
    poison: bool

    def __call__(self, x: Tensor, exchange: RowExchange) -> Tensor:
        rows, gathered = len(x), exchange.plan.rows_per_rank
        self.buffers.rows[:rows].copy_(x)
        if self.poison:
            self.buffers.rows[rows:gathered].fill_(float("nan"))
        self.graphs[gathered].replay()
        return self.buffers.sums[:rows]


class PiecewiseGraphs:
    """Captures a model's MoE stages and its forward in pieces, and runs its forward with them.

    reads_hidden: the model takes hidden states beside tokens; poison: padding is NaN.
    """

    def __init__(
        self,
        model: PassModel,
        collective: RowCollective,
        buckets: PiecewiseBuckets,
        memory: GraphMemory,
        *,
        reads_hidden: bool,
        poison: bool,
        device: torch.device,
    ) -> None:
        self.buckets = buckets
        self._collective = collective
        self._poison = poison
        self._memory = memory
        size = (buckets.max_rows, model.hidden_size)
        rows = torch.zeros(size, dtype=model.dtype, device=device)
        row_ranges = torch.zeros(2, collective.dp_size, dtype=torch.int32, device=device)
        self._buffers = StageRows(rows, torch.zeros_like(rows), row_ranges)
        self._uncaptured: PassModel = model
        self._stages: list[CapturedStage] = []
        self._model: PassModel = model
        self._pieces = ForwardPieces(
            model, collective, row_ranges, buckets.max_rows, memory,
            reads_hidden=reads_hidden, poison=poison,
        )  # fmt: skip

    @property
    def count(self) -> int:
        """Count stages at every size, and forwards in pieces."""
        return len(self.buckets.sizes) * self._uncaptured.num_moe_layers + self._pieces.count

    def capture(self) -> Iterator[None]:
        """Capture stages at every size, then the pieces, and yield after each."""
        stages = self._uncaptured.moe_stages
        graphs: list[dict[int, torch.cuda.CUDAGraph]] = [{} for _ in stages]  # by gathered rows
        for gathered in self.buckets.sizes:
            for stage, of_stage in zip(stages, graphs):
                of_stage[gathered] = self._capture(stage, gathered)
                yield
        self._stages = [
            CapturedStage(
                router=stage.router,
                experts=stage.experts,
                kernels=stage.kernels,
                graphs=of_stage,
                buffers=self._buffers,
                poison=self._poison,
            )
            for stage, of_stage in zip(stages, graphs)
        ]
        captured = {id(stage): replay for stage, replay in zip(stages, self._stages)}
        self._model = self._uncaptured.with_stages(lambda stage: captured[id(stage)])
        yield from self._pieces.capture()

    def forward(self, inputs: PassInputs, plan: PassPlan, exchange: RowExchange) -> Hidden:
        padding = exchange.plan
        self._buffers.row_ranges.copy_(
            on_device(padding.row_ranges, self._buffers.row_ranges.device)
        )
        if self._pieces.covers(inputs):
            hidden = self._pieces.forward(inputs, plan, padding.rows_per_rank)
        else:
            hidden = self._model.forward(inputs, plan, exchange)
        self._collective.arm_watchdog(f"a pass of {padding.rows_per_rank} gathered rows")
        return hidden

    def _capture(self, stage: MoeStage, gathered: int) -> torch.cuda.CUDAGraph:
        buffers = self._buffers
        rows, sums = buffers.rows[:gathered], buffers.sums[:gathered]
        exchange = graph_exchange(
            self._collective, gathered, gathered, self._poison, buffers.row_ranges, sums
        )

        def run() -> None:
            found = stage(rows, exchange)
            if found is not sums:  # without a wire nobody has written there
                sums.copy_(found)

        return capture_graph(run, self._memory)[0]
