"""StepShape: the sizes of a step on all ranks, recorded or simulated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.parallel.agreement import StepRecord
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPlan


@dataclass(frozen=True)
class StepShape:
    records: tuple[StepRecord, ...]  # [rank]
    plans: tuple[ExecutionPlan, ...]  # [pass]
    kv_tokens: tuple[int, ...]  # [rank] in the cache after the target pass
    attended_tokens: tuple[int, ...]  # [rank] by all rows of it

    @property
    def dp_size(self) -> int:
        return len(self.records)

    @property
    def rank_rows(self) -> tuple[int, ...]:  # [rank] in all passes
        return tuple(sum(record.real_rows) for record in self.records)

    @property
    def real_rows(self) -> int:  # of all ranks and passes
        return sum(self.rank_rows)

    @property
    def gathered_rows(self) -> int:
        return sum(plan.padding.total_gathered for plan in self.plans)

    @property
    def wire_rows(self) -> int:  # in one collective of each pass
        return sum(plan.padding.wire_rows for plan in self.plans)

    @property
    def rows(self) -> tuple[object, ...]:  # equal where steps differ in what is cached alone
        kinds = ((r.real_rows, r.prefill_rows, r.num_sampling) for r in self.records)
        return (*kinds, *(plan.padding.gathered_rows for plan in self.plans))

    def count(self, mode: ExecutionMode) -> int:  # of passes
        return sum(plan.mode is mode for plan in self.plans)

    @property
    def num_sampling(self) -> tuple[int, ...]:  # [rank]
        return tuple(record.num_sampling for record in self.records)


def padding_waste(shapes: Sequence[StepShape]) -> float:
    """Return the share of gathered rows that are padding."""
    return 1 - sum(each.real_rows for each in shapes) / sum(each.gathered_rows for each in shapes)


def row_balance(shapes: Sequence[StepShape]) -> float:
    """Return the mean rows of a rank over those of the largest, over all steps."""
    mean = sum(each.real_rows / each.dp_size for each in shapes)
    return mean / sum(max(each.rank_rows) for each in shapes)
