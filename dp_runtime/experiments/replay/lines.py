"""Lines: the steps of a run in a few numbers, as measured or as predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.experiments.replay.step_shape import StepShape, padding_waste, row_balance

NAMES = ("", "steps", "total s", "p50 ms", "p99 ms", "rows/step", "waste", "balance")


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    name: str
    steps: int
    total_s: float  # of all steps, without pauses between them
    step_ms_p50: float
    step_ms_p99: float
    rows_per_step: float  # real, of all ranks
    padding_waste: float
    row_balance: float

    @classmethod
    def of(cls, name: str, shapes: Sequence[StepShape], seconds: Sequence[float]) -> Line:
        p50, p99 = np.percentile(np.array(seconds) * 1e3, (50, 99)).tolist()
        rows = sum(shape.real_rows for shape in shapes) / len(shapes)
        waste, balance = padding_waste(shapes), row_balance(shapes)
        return cls(name, len(shapes), sum(seconds), p50, p99, rows, waste, balance)

    @property
    def cells(self) -> tuple[str, ...]:
        return (
            self.name, str(self.steps), f"{self.total_s:.3f}", f"{self.step_ms_p50:.3f}",
            f"{self.step_ms_p99:.3f}", f"{self.rows_per_step:.1f}", f"{self.padding_waste:.1%}",
            f"{self.row_balance:.1%}",
        )  # fmt: skip


def table(lines: Sequence[Line]) -> str:
    rows = [NAMES, *(line.cells for line in lines)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )
