"""Totals: what the finished steps of a rank add up to."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import zip_longest

from dp_runtime.metrics.histogram import SECONDS, TOKENS, Histogram
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace

MAX_REMEMBERED_STEPS = 20_000


@dataclass
class Totals:
    """Sums over the steps of one rank since it began to step.

    The thread that steps adds to them; others read copies.
    """

    dp_rank: int
    steps: int = 0
    output_tokens: int = 0
    prompt_tokens: int = 0
    preemptions: int = 0
    prefixes: PrefixCounts = field(default_factory=PrefixCounts)
    real_rows: int = 0  # of this rank, in all passes
    gathered_rows: int = 0  # of this rank, padding included
    max_rows: int = 0  # sum over passes of the largest rank's rows
    wire_rows: int = 0  # of all ranks
    wait_s: float = 0.0  # for slower ranks
    wait_for_s: dict[int, float] = field(default_factory=partial(defaultdict, float))  # by whom
    idle_steps: int = 0  # this rank had no rows while another had
    prefill_budget: int = 0  # prompt tokens of a step, when there last was a limit
    held_back_steps: int = 0  # prompts of this rank would have had more of the step without it
    drafts_proposed: int = 0
    accepted: tuple[int, ...] = ()  # verifications by how many of their drafts were accepted
    phase_s: dict[str, float] = field(default_factory=partial(defaultdict, float))  # but waits
    pass_s: dict[str, float] = field(default_factory=partial(defaultdict, float))  # but waits
    pass_modes: dict[tuple[str, str], int] = field(default_factory=Counter)  # by pass and mode
    step_s: Histogram = field(default_factory=partial(Histogram.of, SECONDS))  # waits included
    step_tokens: Histogram = field(default_factory=partial(Histogram.of, TOKENS))  # in and out
    queue_s: Histogram = field(default_factory=partial(Histogram.of, SECONDS))  # of each request

    @property
    def busy_s(self) -> float:
        return sum(self.phase_s.values()) + sum(self.pass_s.values())

    def add(self, step: StepTrace) -> None:
        wait_s = step.wait_s
        self.steps += 1
        self.output_tokens += step.output_tokens
        self.prompt_tokens += step.prompt_tokens
        self.preemptions = step.num_preemptions
        self.prefixes = step.prefixes
        self.wait_s += wait_s
        self.idle_steps += not any(each.real_rows[step.index] for each in step.passes)
        for each in step.passes:
            self._add_pass(each, step.index)
        for phase, seconds in step.phases:
            self.phase_s[phase] += seconds
        self.step_s.add(step.busy_s + wait_s)
        self.step_tokens.add(step.prompt_tokens + step.output_tokens)
        if step.num_drafts:
            self.drafts_proposed += step.num_drafts * sum(step.accepted)
            self.accepted = add_counts(self.accepted, step.accepted)

    def _add_pass(self, one: PassTrace, index: int) -> None:
        self.real_rows += one.real_rows[index]
        self.gathered_rows += one.gathered_rows[index]
        self.max_rows += one.max_rows
        self.wire_rows += one.wire_rows
        self.pass_s[one.pass_kind] += one.busy_s
        self.pass_modes[one.pass_kind, one.mode] += 1

    def add_wait(self, slowest_rank: int, seconds: float) -> None:
        if seconds:
            self.wait_for_s[slowest_rank] += seconds

    def add_prefill_budget(self, budget: int, held_back: bool) -> None:
        self.prefill_budget = budget
        self.held_back_steps += held_back

    def copied(self) -> Totals:
        return replace(
            self,
            wait_for_s=dict(self.wait_for_s),
            phase_s=dict(self.phase_s),
            pass_s=dict(self.pass_s),
            pass_modes=dict(self.pass_modes),
            step_s=self.step_s.copied(),
            step_tokens=self.step_tokens.copied(),
            queue_s=self.queue_s.copied(),
        )


class Recorder:
    """Remembers the last steps of a rank and adds all of them up."""

    def __init__(self, dp_rank: int) -> None:
        self.steps: deque[StepTrace] = deque(maxlen=MAX_REMEMBERED_STEPS)
        self.totals = Totals(dp_rank)

    def add(self, step: StepTrace) -> None:
        self.steps.append(step)
        self.totals.add(step)


def add_counts(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip_longest(one, other, fillvalue=0))
