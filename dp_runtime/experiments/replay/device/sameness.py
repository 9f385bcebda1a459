"""Sameness: how much of a replay was as recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dp_runtime.experiments.replay.device.requests import LEAD
from dp_runtime.experiments.replay.recorded_steps import RecordedStep
from dp_runtime.metrics.recorded.request_tokens import RequestTokens
from dp_runtime.parallel.agreement import StepRecord


@dataclass(frozen=True)
class Sameness:
    steps: int  # that either has; 0 where requests came at their times, so steps are others
    rows: int  # of these, those with the same real rows on all ranks
    agreements: int  # and the same records, but for times, and the same plans
    requests: int  # whose tokens were recorded
    tokens: int  # of these, those with the same output

    @classmethod
    def of_steps(
        cls, recorded: Sequence[RecordedStep], replayed: Sequence[RecordedStep]
    ) -> Sameness:
        """Compare steps by their numbers, up to the last recorded one."""
        before = _numbered(recorded, recorded[0].traces[0].step_id)
        after = _numbered(replayed, LEAD)
        last = max(before)
        numbers = {*before, *(number for number in after if number <= last)}
        pairs = [(before.get(number), after.get(number)) for number in numbers]
        both = [(one, other) for one, other in pairs if one is not None and other is not None]
        alike = [(one, other) for one, other in both if _rows(one) == _rows(other)]
        agreed = sum(_agreed(one) == _agreed(other) for one, other in alike)
        return cls(len(numbers), len(alike), agreed, 0, 0)

    @classmethod
    def of_tokens(
        cls, kept: Iterable[RequestTokens], outputs: Mapping[int, Sequence[int]]
    ) -> Sameness:
        asked = [each for each in kept if each.request_id in outputs]
        same = sum(
            tuple(outputs[each.request_id][: len(each.outputs)]) == each.outputs for each in asked
        )
        return cls(0, 0, 0, len(asked), same)

    def __add__(self, other: Sameness) -> Sameness:
        both = zip(vars(self).values(), vars(other).values())
        return Sameness(*(one + more for one, more in both))

    def __str__(self) -> str:
        parts = []
        if self.steps:
            parts.append(
                f"rows of {self.rows}, agreements of {self.agreements} steps of {self.steps}"
            )
        if self.requests:
            parts.append(f"tokens of {self.tokens} requests of {self.requests}")
        return f"as recorded: {', '.join(parts) or 'nothing that could be compared'}"


def _numbered(steps: Sequence[RecordedStep], first: int) -> dict[int, RecordedStep]:
    return {step.traces[0].step_id - first: step for step in steps}


def _rows(step: RecordedStep) -> list[tuple[int, ...]]:
    return [record.real_rows for record in step.records]


def _agreed(step: RecordedStep) -> tuple[object, ...]:
    return (step.plans, *map(_without_times, step.records))


def _without_times(record: StepRecord) -> StepRecord:
    return record._replace(epoch=0, step_id=0, waited_us=0, step_us=0)
