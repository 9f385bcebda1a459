"""Graphs for ranks without a GPU: capturing them meets the other ranks, replaying them is eager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from dp_runtime.core.attention_metadata import Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.step_program import Pass
from dp_runtime.models.causal_lm import Hidden
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import GraphBuckets, GraphKey, PiecewiseBuckets
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPlan
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.row_exchange import RowExchange
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs.pass_graphs import PassGraphs, PassOutput
from dp_runtime.runner.pass_runner import PassRunner
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_runner import CapturedGraphs
from dp_runtime.runner.step_timer import PassTimer
from dp_runtime.sampling.row_logits import RowLogits

STAGES = PiecewiseBuckets(16)
Meet = Callable[[], None]  # what stands for the capture of one graph


class EagerGraphs:
    """Stands for a pass's captured graphs: launches again what they would replay."""

    def __init__(
        self, runner: PassRunner, buckets: GraphBuckets, with_logits: bool, meet: Meet
    ) -> None:
        self.buckets = buckets
        self.replays: list[PaddingPlan] = []
        self._runner, self._with_logits, self._meet = runner, with_logits, meet

    @property
    def count(self) -> int:
        return PassGraphs.count.fget(self)  # type: ignore[attr-defined]

    def capture(self) -> Iterator[None]:
        for _ in self.buckets.graph_keys():
            self._meet()
            yield

    def capture_beside_prefill(self) -> Iterator[None]:
        for _ in self.buckets.keys_beside_prefill():
            self._meet()
            yield

    def has(self, rows: int, gathered: int) -> bool:
        keys = (*self.buckets.graph_keys(), *self.buckets.keys_beside_prefill())
        return GraphKey(self.buckets.local(rows), gathered) in keys

    def covers(self, batch: LocalBatch) -> bool:
        return PassGraphs.covers(self, batch)  # type: ignore[arg-type]

    def replay(
        self, batch: LocalBatch, plan: PaddingPlan, future: FutureTokens, place: Place
    ) -> PassOutput:
        self.replays.append(plan)
        eager = ExecutionPlan(ExecutionMode.EAGER, self.buckets.query_len, plan)
        timer = PassTimer(self._runner.collective)
        hidden = self._runner.run(eager, batch, future, place, timer, False).hidden
        if not self._with_logits:
            return PassOutput(hidden, None)
        return PassOutput(hidden, RowLogits.from_logits(self._runner.model.logits(hidden.last)))


class EagerStages:
    """Stands for a model's captured stages."""

    def __init__(self, model: PassModel, buckets: PiecewiseBuckets, meet: Meet) -> None:
        self.buckets = buckets
        self.plans: list[PaddingPlan] = []
        self._model, self._meet = model, meet

    @property
    def count(self) -> int:
        return len(self.buckets.sizes) * self._model.num_moe_layers

    def capture(self) -> Iterator[None]:
        for _ in range(self.count):
            self._meet()
            yield

    def forward(self, inputs: Any, metadata: Any, exchange: RowExchange) -> Hidden:
        self.plans.append(exchange.plan)
        return self._model.forward(inputs, metadata, exchange)


def captured_of(loop: StepLoop, meet: Meet = lambda: None) -> CapturedGraphs:
    """Graphs of up to 2 requests a rank, and stages of up to 16 rows."""
    program, passes = loop.coordinator.program, loop.runner.passes
    graphs: Any = {}
    for pass_kind, runner in passes.items():
        length = program.query_len(pass_kind)
        with_logits = pass_kind is not Pass.DRAFT_EXTEND
        of_pass = EagerGraphs(runner, GraphBuckets(2, length, STAGES.sizes), with_logits, meet)
        graphs[pass_kind] = {length: of_pass}
    models = dict.fromkeys(runner.model for runner in passes.values())
    stages: Any = {model: EagerStages(model, STAGES, meet) for model in models}
    return CapturedGraphs(graphs, stages)
