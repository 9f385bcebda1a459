"""A RowExchange that notes when its collectives are entered and left."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from dp_runtime.flight.recorder import FlightRecorder, Kind
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.row_exchange import RowExchange

ALL_GATHER, REDUCE_SCATTER = int(Kind.ALL_GATHER), int(Kind.REDUCE_SCATTER)


@dataclass(frozen=True, eq=False)
class RecordedExchange:
    """For collectives that the host launches; those in a graph are part of its replay."""

    exchange: RowExchange
    flight: FlightRecorder

    @property
    def plan(self) -> PaddingPlan:
        return self.exchange.plan

    @property
    def row_ranges(self) -> Tensor | None:
        return self.exchange.row_ranges

    def gather(self, rows: Tensor) -> Tensor:
        self.flight.enter(ALL_GATHER, self._rows, rows.shape[1] * rows.itemsize)
        gathered = self.exchange.gather(rows)
        self.flight.leave()
        return gathered

    def reduce_scatter(self, partial: Tensor) -> Tensor:
        self.flight.enter(REDUCE_SCATTER, self._rows, partial.shape[1] * partial.itemsize)
        sums = self.exchange.reduce_scatter(partial)
        self.flight.leave()
        return sums

    @cached_property
    def _rows(self) -> int:
        return self.plan.total_gathered
