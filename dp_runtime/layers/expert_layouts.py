"""Where a checkpoint keeps the matrices of an expert: a tensor each, or stacks of all experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dp_runtime.weights.source import Part, Shape, WeightSource


@dataclass(frozen=True)
class ExpertNames:
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class ExpertShape:
    num_experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True)
class StoredMatrix:
    """One expert's matrix in a tensor of its own, or in a stack [experts, rows, columns]."""

    name: str
    shape: Shape  # of the whole tensor
    expert: int | None = None  # index in a stack
    first_row: int = 0

    def part(self, rows: slice, columns: slice) -> Part:
        if self.expert is None:
            return rows, columns
        moved = slice(self.first_row + rows.start, self.first_row + rows.stop)
        return slice(self.expert, self.expert + 1), moved, columns


@dataclass(frozen=True)
class StoredExpert:
    gate: StoredMatrix
    up: StoredMatrix
    down: StoredMatrix

    @property
    def names(self) -> set[str]:
        return {self.gate.name, self.up.name, self.down.name}


def locate_experts(
    weights: WeightSource, prefix: str, names: ExpertNames, shape: ExpertShape
) -> Callable[[int], StoredExpert]:
    """Find the layout of a checkpoint; stacks are what transformers 5 has in memory."""
    num_experts, hidden, intermediate = shape.num_experts, shape.hidden, shape.intermediate
    up_shape, down_shape = (num_experts, intermediate, hidden), (num_experts, hidden, intermediate)
    both_shape = (num_experts, 2 * intermediate, hidden)  # gate first
    for end in ("", ".weight"):
        both, down = f"{prefix}.gate_up_proj{end}", f"{prefix}.down_proj{end}"
        if weights.has(both):
            return lambda expert: StoredExpert(
                StoredMatrix(both, both_shape, expert),
                StoredMatrix(both, both_shape, expert, intermediate),
                StoredMatrix(down, down_shape, expert),
            )
        gate, up, down = (f"{prefix}.{n}{end}" for n in (names.gate, names.up, names.down))
        if weights.has(gate):
            return lambda expert: StoredExpert(
                StoredMatrix(gate, up_shape, expert),
                StoredMatrix(up, up_shape, expert),
                StoredMatrix(down, down_shape, expert),
            )
    return lambda expert: StoredExpert(
        StoredMatrix(f"{prefix}.{expert}.{names.gate}.weight", up_shape[1:]),
        StoredMatrix(f"{prefix}.{expert}.{names.up}.weight", up_shape[1:]),
        StoredMatrix(f"{prefix}.{expert}.{names.down}.weight", down_shape[1:]),
    )
