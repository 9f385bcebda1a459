"""Step programs: the passes of a step and their order, equal on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_PASSES = 8
MAX_DRAFTS = MAX_PASSES - 1  # tokens that a program drafts: all but the first need a pass


class Pass(StrEnum):
    DRAFT = "draft"  # the draft model gives every decoding request its next token
    TARGET = "target"  # the model runs decodes or verifications, and prefill chunks
    DRAFT_EXTEND = "draft_extend"  # the draft model runs the target's rows: a next first draft


@dataclass(frozen=True)
class Program:
    """The passes of a step; every rank runs all of them in this order, with any number of rows."""

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        assert len(self.passes) <= MAX_PASSES, f"a program has at most {MAX_PASSES} passes: {self}"
        assert self.passes.count(Pass.TARGET) == 1, f"a program has one target pass: {self}"
        drafts = self.passes.count(Pass.DRAFT)
        tail = (Pass.TARGET,) if len(self.passes) == 1 else (Pass.TARGET, Pass.DRAFT_EXTEND)
        due = (Pass.DRAFT,) * drafts + tail
        assert self.passes == due, f"drafts come before the target, draft_extend after: {self}"

    @property
    def num_drafts(self) -> int:
        """Count the drafts of each decoding request that the target verifies."""
        return self.passes.count(Pass.DRAFT) + self.passes.count(Pass.DRAFT_EXTEND)

    def query_len(self, pass_kind: Pass) -> int:
        """Count a decoding request's rows in a pass: its last token, and the drafts to verify."""
        return 1 if pass_kind is Pass.DRAFT else 1 + self.num_drafts

    @classmethod
    def speculative(cls, num_drafts: int) -> Program:
        """Draft num_drafts tokens; the last step's draft_extend left the first of them."""
        drafts = (Pass.DRAFT,) * (num_drafts - 1)
        return cls((*drafts, Pass.TARGET, Pass.DRAFT_EXTEND))


SERVING_PROGRAMS: tuple[Program, ...] = (Program((Pass.TARGET,)),)  # a program's id is its index


def speculative_programs(num_drafts: int, adaptive: bool) -> tuple[Program, ...]:
    lengths = range(1, num_drafts + 1) if adaptive else (num_drafts,)
    return tuple(Program.speculative(length) for length in lengths)
