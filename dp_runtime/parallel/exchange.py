"""RowExchange: how the rows of one pass travel in its MoE stages; the only caller of pad, strip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dp_runtime.parallel.collective import DeviceCountCollective, RowCollective
from dp_runtime.parallel.padding import PaddingPlan, pad, strip


class RowExchange(Protocol):
    """What a MoE stage needs to exchange rows; handed down through forward.

    Gathered rows that are not real are undefined, or NaN where a test poisons them.
    """

    @property
    def plan(self) -> PaddingPlan: ...

    @property
    def row_ranges(self) -> Tensor | None:
        """[2, dp_size] int32: where each rank's rows begin among the gathered ones, and how many
        are real, if only the device knows it; else the plan does."""

    def gather(self, rows: Tensor) -> Tensor:
        """Own rows [own, hidden] -> all ranks' rows [total gathered, hidden]."""

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        """Partial sums [total gathered, hidden] -> the sum of the own rows [own, hidden]."""


@dataclass(frozen=True, eq=False)
class PaddedExchange:
    """Own rows are padded to the plan's, which all cross the wire."""

    plan: PaddingPlan
    collective: RowCollective
    poison: bool  # fill padded rows with NaN
    row_ranges: Tensor | None = None

    def gather(self, rows: Tensor) -> Tensor:
        padded = pad(rows, self.plan, self.poison)
        return self.collective.all_gather(padded, self.plan.gathered_rows)

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        sums = self.collective.reduce_scatter(partial, self.plan.gathered_rows)
        return strip(sums, self.plan)


@dataclass(frozen=True, eq=False)
class CountedExchange:
    """Rows that are real when the device comes to them cross the wire; shapes are the plan's.

    Own rows beyond them, a graph's null rows, come back as 0.
    """

    plan: PaddingPlan  # the shapes: equally many gathered rows of every rank
    collective: DeviceCountCollective
    poison: bool  # fill gathered rows that are not real with NaN
    row_ranges: Tensor

    def gather(self, rows: Tensor) -> Tensor:
        rows_per_rank = self.plan.own_gathered
        return self.collective.all_gather_v(rows, self.row_ranges, rows_per_rank, self.poison)

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        return self.collective.reduce_scatter_v(partial, self.row_ranges, self.plan.own_real)


def counts_on_device(collective: RowCollective) -> bool:
    """Whether a graph's exchange costs what the real rows cost, whatever its shapes are."""
    return collective.dp_size == 1 or isinstance(collective, DeviceCountCollective)


def graph_plan(
    collective: RowCollective, real_rows: tuple[int, ...], gathered_rows: int
) -> PaddingPlan:
    """The plan of a step whose ranks replay graphs of so many gathered rows each."""
    size = collective.dp_size
    counted = size > 1 and counts_on_device(collective)
    return PaddingPlan(collective.dp_rank, real_rows, (gathered_rows,) * size, counted)


def graph_exchange(
    plan: PaddingPlan, collective: RowCollective, poison: bool, row_ranges: Tensor
) -> RowExchange:
    """The exchange of a graph, whose replays read from row_ranges which rows are real."""
    if plan.counted:
        assert isinstance(collective, DeviceCountCollective), f"{collective} can't count rows"
        return CountedExchange(plan, collective, poison, row_ranges)
    return PaddedExchange(plan, collective, poison, row_ranges)
