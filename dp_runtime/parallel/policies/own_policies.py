"""Policies of the user's own that run on every rank, and checks of what they say.

NOTE: all ranks must choose alike, by nothing but the arguments since the epoch began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from dp_runtime.core.plain_values import plain_int
from dp_runtime.errors import require, shown
from dp_runtime.parallel.agreement import StepTotals
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.policies.policy_errors import policy_errors
from dp_runtime.parallel.prefill_budget import StepLoad


class Padding(Protocol):
    def gathered_rows(self, real_rows: tuple[int, ...]) -> Sequence[int]:
        """Return the rows that each rank brings to a collective: at least its real ones."""


class Budget(Protocol):
    def prefill_budget(self, load: StepLoad) -> int | None:
        """Return the prompt tokens that each rank may take into the next step; None: no limit."""


class DraftTotals(NamedTuple):
    """What all ranks know of the drafts of steps that have ended since the last call."""

    num_drafts: int  # of each request in this step
    max_drafts: int  # speculative_num_steps
    proposed: int  # by all ranks
    accepted: int


class DraftLength(Protocol):
    def draft_length(self, totals: DraftTotals) -> int:
        """Return how many tokens the next step drafts for each request, 1..max_drafts."""


@dataclass(frozen=True, eq=False)
class OwnPadding:
    policy: Padding
    max_rows: int  # of a rank: what memory was planned for

    def plan(self, real_rows: tuple[int, ...]) -> PaddingPlan:
        if not any(real_rows):
            return PaddingPlan(real_rows, real_rows)
        with policy_errors("padding", self.policy):
            said = self.policy.gathered_rows(real_rows)
            rows = tuple(row for each in said if (row := plain_int(each)) is not None)
            ok = len(rows) == len(said) == len(real_rows)
            ok = ok and all(r <= g <= self.max_rows for r, g in zip(real_rows, rows))
            allowed = f"for real_rows {real_rows} a number for each rank, from its own to"
            require(ok, "padding: gathered_rows", shown(said), f"{allowed} {self.max_rows}")
        return PaddingPlan(real_rows, rows)


@dataclass(frozen=True, eq=False)
class OwnBudget:
    policy: Budget
    max_rows: int  # max_num_tokens

    def __call__(self, load: StepLoad) -> int | None:
        with policy_errors("prefill_budget", self.policy):
            said = self.policy.prefill_budget(load)
            rows = plain_int(said)
            ok = said is None or (rows is not None and 1 <= rows <= self.max_rows)
            allowed = f"None or prompt tokens, 1..{self.max_rows}"
            require(ok, "prefill_budget: prefill_budget", said, allowed)
        return rows


@dataclass(frozen=True, eq=False)
class OwnDraftLength:
    policy: DraftLength
    max_drafts: int

    def __call__(self, totals: StepTotals) -> int:
        current = totals.program_id + 1  # program i drafts i + 1 tokens
        known = DraftTotals(
            current, self.max_drafts, totals.drafts_proposed, totals.drafts_accepted
        )
        with policy_errors("speculative_draft_length", self.policy):
            said = self.policy.draft_length(known)
            length = plain_int(said)
            ok = length is not None and 1 <= length <= self.max_drafts
            require(ok, "speculative_draft_length: draft_length", said, f"1..{self.max_drafts}")
        assert length is not None, "checked above"
        return length - 1
