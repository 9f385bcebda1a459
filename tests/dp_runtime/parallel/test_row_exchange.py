"""Both exchanges of the MoE stage on threads: rows counted late, and rows padded to a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from collectives.in_process import InProcessCollective, InProcessGroup
from collectives.rows import sum_in_rank_order
from dp_runtime.core.step_program import SERVING_PROGRAMS, Pass
from dp_runtime.layers.experts import Experts
from dp_runtime.layers.moe import MoeStage, RankSharding
from dp_runtime.layers.moe_kernels import TorchMoe
from dp_runtime.layers.moe_router import Router
from dp_runtime.parallel.agreement import StepRecord, agree
from dp_runtime.parallel.buckets import GraphBuckets
from dp_runtime.parallel.collective import DeviceCountCollective
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPolicy
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.row_exchange import (
    CountedExchange,
    PaddedExchange,
    RowExchange,
    counts_real_rows,
    graph_exchange,
)
from dp_runtime.parallel.step_board import StepBoard
from tests.collectives.ranks import run_threads
from tests.dp_runtime.layers.test_moe import HIDDEN, build_stage, dense, rank_rows

BUCKET, EXPERTS, INTERMEDIATE = 6, 5, 11


class Counted(InProcessCollective):
    """Reads the row_ranges as late as a device would; only real rows meet."""

    def __init__(self, inner: InProcessCollective) -> None:
        self.__dict__.update(inner.__dict__)
        self.crossed: list[int] = []
        self.poisoned: list[bool] = []

    def reserve(self, rows_per_rank: int, row_bytes: int) -> None:
        pass

    def all_gather_v(
        self, rows: Tensor, row_ranges: Tensor, total_rows: int, most_rows: int, poison: bool
    ) -> Tensor:
        starts, real = row_ranges.tolist()
        assert max(real) <= most_rows <= total_rows
        parts = self._cross(rows[: real[self.dp_rank]].clone())
        self.poisoned.append(poison)
        fill = float("nan") if poison else 3.0
        out = rows.new_full((total_rows, rows.shape[1]), fill)
        for start, part in zip(starts, parts):
            out[start : start + len(part)] = part
        return out

    def reduce_scatter_v(
        self, partial: Tensor, row_ranges: Tensor, out: Tensor, most_rows: int
    ) -> None:
        starts, real = row_ranges.tolist()
        assert len(out) <= most_rows
        out.zero_()
        parts = self._cross([partial[start : start + n] for start, n in zip(starts, real)])
        mine = [part[self.dp_rank] for part in parts]
        sum_in_rank_order(mine, out[: real[self.dp_rank]])

    def _cross(self, value: Tensor | list[Tensor]) -> Sequence[Any]:
        self.crossed.append(len(value) if isinstance(value, Tensor) else sum(map(len, value)))
        return self._meet(value, "counted rows")


class LayoutMoe(TorchMoe):
    """As the kernels for graphs: reads from the row_ranges which rows are real."""

    def partial_sums(
        self, gathered: Tensor, plan: PaddingPlan, row_ranges: Tensor | None, router: Router,
        experts: Experts,
    ) -> Tensor:  # fmt: skip
        assert row_ranges is not None
        assert len(gathered) == plan.total_gathered
        sums = torch.zeros_like(gathered)
        for start, count in row_ranges.T.tolist():
            weights, ids = router(gathered[start : start + count])
            sums[start : start + count] = experts(gathered[start : start + count], ids, weights)
        return sums


def run_case(
    inner: InProcessCollective, board: StepBoard, real: tuple[int, ...], own_rows: tuple[int, ...]
) -> dict[tuple[str, bool], Tensor]:
    """The stage's rows by exchange and poison; rows beyond the real ones are not 0 before."""
    collective, rank, size = Counted(inner), inner.dp_rank, inner.dp_size
    row_ranges = torch.from_numpy(PaddingPlan(real, (BUCKET,) * size).row_ranges)
    stage = build_stage(RankSharding("ep", rank, size), EXPERTS, INTERMEDIATE)
    stage = MoeStage(stage.router, stage.experts, LayoutMoe())
    null = torch.full((own_rows[rank] - real[rank], HIDDEN), 0.7)
    rows = torch.cat([rank_rows(real)[rank], null])
    shapes = tuple(own_rows[r] if r == rank else BUCKET for r in range(size))
    results = {}
    for poison in (False, True):
        plan = PaddingPlan(shapes, (BUCKET,) * size)
        exchanges: dict[str, RowExchange] = {
            "padded": PaddedExchange(plan, inner, poison, row_ranges),
            "counted": CountedExchange(plan, collective, poison, row_ranges),
        }
        with torch.inference_mode():
            for name, exchange in exchanges.items():
                results[name, poison] = stage(rows.clone(), exchange)
    assert collective.poisoned == [False, True]
    assert collective.crossed == [real[rank], sum(real)] * 2, "only real rows meet"
    return results


CASES = [
    ((4,), (6,)),
    ((3, 5), (4, 6)),
    ((0, 2), (0, 2)),
    ((0, 2), (2, 2)),
    ((0, 0), (0, 3)),
    ((6, 0, 1), (6, 1, 1)),
    ((0, 0, 0, 5), (0, 4, 0, 6)),
]


@pytest.mark.parametrize(("real", "own_rows"), CASES)
def test_rows_counted_on_the_device_have_the_bits_of_padded_ones(
    real: tuple[int, ...], own_rows: tuple[int, ...]
) -> None:
    ranks = run_threads(len(real), 20.0, run_case, (real, own_rows))
    for rank, results in enumerate(thread.result() for thread in ranks):
        first = results["padded", False]
        due = dense(rank_rows(real)[rank], EXPERTS, INTERMEDIATE)
        assert first.shape == (own_rows[rank], HIDDEN)
        torch.testing.assert_close(first[: real[rank]].double(), due, atol=2e-5, rtol=2e-5)
        for result in results.values():
            assert torch.equal(result, first)
            assert (result[real[rank] :] == 0).all(), "null rows are finite"


def test_a_graph_counts_on_the_device_where_the_collective_can() -> None:
    row_ranges = torch.zeros(2, 2, dtype=torch.int32)
    plain = InProcessGroup(2, 1.0).collective(0)
    for collective, counted, kind in (
        (plain, False, PaddedExchange),
        (Counted(plain), True, CountedExchange),
    ):
        assert isinstance(collective, DeviceCountCollective) == counted
        exchange = graph_exchange(collective, 3, BUCKET, True, row_ranges)
        assert isinstance(exchange, kind)
        assert exchange.plan == PaddingPlan((3, 0), (BUCKET, BUCKET), counted)
    alone = Counted(InProcessGroup(1, 1.0).collective(0))
    exchange = graph_exchange(alone, 3, BUCKET, True, row_ranges)
    assert isinstance(exchange, PaddedExchange), "there is no wire"


def test_a_step_of_graphs_reports_the_rows_that_cross() -> None:
    collective = InProcessGroup(2, 1.0).collective(0)
    records = [StepRecord(0, 0, 0, (rows,), graph_votes=1) for rows in (3, 1)]
    for kind, crossing in ((collective, 32), (Counted(collective), 4)):
        execution = ExecutionPolicy(
            graphs={(Pass.TARGET, 1): GraphBuckets(64)}, counted=counts_real_rows(kind)
        )
        (plan,) = agree(records, SERVING_PROGRAMS, execution=execution).plans
        assert plan.mode is ExecutionMode.GRAPH
        assert (plan.padding.gathered_rows, plan.padding.wire_rows) == ((16, 16), crossing)
