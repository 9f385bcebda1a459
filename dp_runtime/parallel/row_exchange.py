"""RowExchange: how the rows of one pass travel in its MoE stages; the only caller of pad, strip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dp_runtime.parallel.collective import DeviceCountCollective, RowCollective
from dp_runtime.parallel.padding import PaddingPlan, pad, strip


class RowExchange(Protocol):
    """A MoE stage exchanges rows through this; gathered rows that are not real are undefined."""

    @property
    def plan(self) -> PaddingPlan: ...

    @property
    def row_ranges(self) -> Tensor | None:
        """Return PaddingPlan.row_ranges where only the device knows which rows are real."""

    def gather(self, rows: Tensor) -> Tensor: ...  # [local, hidden] -> [total gathered, hidden]

    def reduce_scatter(self, partial: Tensor) -> Tensor: ...  # and back, summed


@dataclass(frozen=True, eq=False)
class PaddedExchange:
    """Pads local rows to the plan's gathered rows, which all cross the wire."""

    plan: PaddingPlan
    collective: RowCollective
    poison: bool  # fill padded rows with NaN
    row_ranges: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        padded = pad(rows, self.plan, self.collective.dp_rank, self.poison)
        return self.collective.all_gather(padded, self.plan.gathered_rows)

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        sums = self.collective.reduce_scatter(partial, self.plan.gathered_rows)
        return strip(sums, self.plan, self.collective.dp_rank)


@dataclass(frozen=True, eq=False)
class CountedExchange:
    """Only rows that row_ranges calls real cross the wire; other local rows come back as 0."""

    plan: PaddingPlan  # a graph's shapes: here null rows count as real
    collective: DeviceCountCollective
    poison: bool  # fill gathered rows that are not real with NaN
    row_ranges: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        total, most_rows = self.plan.total_gathered, self.plan.rows_per_rank
        return self.collective.all_gather_v(rows, self.row_ranges, total, most_rows, self.poison)

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        local_rows = self.plan.real_rows[self.collective.dp_rank]
        sums = partial.new_empty(local_rows, partial.shape[1])
        self.collective.reduce_scatter_v(partial, self.row_ranges, sums, self.plan.rows_per_rank)
        return sums


def counts_real_rows(collective: RowCollective) -> bool:
    """Tell whether only real rows cross the wire in graphs, whatever their shapes are."""
    return collective.dp_size > 1 and isinstance(collective, DeviceCountCollective)


def graph_exchange(
    collective: RowCollective,
    own_rows: int,  # null rows among them
    gathered: int,  # of every rank
    poison: bool,
    row_ranges: Tensor,
) -> RowExchange:
    size = collective.dp_size
    shapes = [0] * size
    shapes[collective.dp_rank] = own_rows
    plan = PaddingPlan(tuple(shapes), (gathered,) * size, counts_real_rows(collective))
    if plan.counted:
        assert isinstance(collective, DeviceCountCollective), f"{collective} can't count rows"
        return CountedExchange(plan, collective, poison, row_ranges)
    return PaddedExchange(plan, collective, poison, row_ranges)
