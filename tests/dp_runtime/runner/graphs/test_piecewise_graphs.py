"""What replayed MoE stages read and write; graphs themselves are captured in tests/gpu."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.in_process import InProcessGroup
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.step_program import Pass
from dp_runtime.layers.gated_delta_net import GatedDeltaNet
from dp_runtime.layers.moe import MoeStage
from dp_runtime.models.causal_lm import Hidden
from dp_runtime.parallel.buckets import PiecewiseBuckets
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPolicy
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange, RowExchange
from dp_runtime.runner.graphs.cuda_graph import GraphMemory
from dp_runtime.runner.graphs.forward_pieces import ForwardPieces
from dp_runtime.runner.graphs.piecewise_graphs import PiecewiseGraphs

HIDDEN = 4


class Scaling(MoeStage):
    """A stage that multiplies real rows by a factor, and reads which are real from the layout."""

    def __init__(self, factor: float) -> None:
        object.__setattr__(self, "router", None)
        object.__setattr__(self, "experts", None)
        object.__setattr__(self, "kernels", factor)

    def __call__(self, x: Tensor, exchange: RowExchange) -> Tensor:
        assert exchange.row_ranges is not None, "a captured stage reads counts on the device"
        real = int(exchange.row_ranges[1, 0])
        return torch.cat([x[:real] * float(self.kernels), torch.full_like(x[real:], torch.nan)])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Stages:
    """A model of nothing but MoE stages."""

    moe_stages: tuple[MoeStage, ...]
    delta_nets: tuple[GatedDeltaNet, ...] = ()
    hidden_size: int = HIDDEN
    dtype: torch.dtype = torch.float32

    @property
    def backend(self) -> Any:
        spec = AttentionSpec(2, 1, 8, 16, torch.float32, torch.float32)
        return SimpleNamespace(spec=spec)

    @property
    def num_moe_layers(self) -> int:
        return len(self.moe_stages)

    def with_stages(self, make: Callable[[MoeStage], MoeStage]) -> Stages:
        return replace(self, moe_stages=tuple(make(stage) for stage in self.moe_stages))

    def forward(self, x: Any, metadata: Any, exchange: RowExchange) -> Hidden:
        total = x
        for stage in self.moe_stages:
            total = total + stage(total, exchange)
        return Hidden(total, total)


class Replay:
    """Stands for a graph: runs again what was captured."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.replay = run


@pytest.fixture
def collective() -> RowCollective:
    return InProcessGroup(1, 1.0).collective(0)


@pytest.fixture
def graphs(collective: RowCollective, monkeypatch: pytest.MonkeyPatch) -> PiecewiseGraphs:
    def capture(self: PiecewiseGraphs, stage: MoeStage, gathered: int) -> Replay:
        buffers = self._buffers
        plan = PaddingPlan((gathered,), (gathered,))
        exchange = PaddedExchange(plan, collective, False, buffers.row_ranges)

        def run() -> None:
            buffers.sums[:gathered].copy_(stage(buffers.rows[:gathered], exchange))

        return Replay(run)

    monkeypatch.setattr(PiecewiseGraphs, "_capture", capture)
    monkeypatch.setattr(GraphMemory, "new", lambda: None)
    monkeypatch.setattr(ForwardPieces, "_capture", lambda *_: None)
    monkeypatch.setattr(ForwardPieces, "covers", lambda *_: False)
    model: Any = Stages((Scaling(2.0), Scaling(3.0)))
    buckets = PiecewiseBuckets.for_steps(50)
    memory: Any = None
    made = PiecewiseGraphs(
        model, collective, buckets, memory,
        reads_hidden=False, poison=False, device=torch.device("cpu"),
    )  # fmt: skip
    with torch.inference_mode():
        assert sum(1 for _ in made.capture()) == made.count
    return made


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 50])
def test_replayed_stages_give_the_own_rows(
    graphs: PiecewiseGraphs, collective: RowCollective, rows: int
) -> None:
    execution = ExecutionPolicy(piecewise=graphs.buckets)
    mode, _, plan, _ = execution.plan(Pass.TARGET, 1, (rows,), False)
    assert mode is ExecutionMode.PIECEWISE
    assert plan.rows_per_rank >= rows
    x: Any = torch.randn(rows, HIDDEN)
    for _ in range(2):  # nothing of one forward is left over in the next
        out = graphs.forward(x, None, PaddedExchange(plan, collective, False))  # type: ignore[arg-type]
        torch.testing.assert_close(out.last, x * 3 * 4)
