"""Step programs: which forwards a step consists of, in which order, on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_SLOTS = 8
MAX_DRAFTS = MAX_SLOTS - 1  # tokens that a program drafts: all but the first need a slot


class Slot(StrEnum):
    """One forward of a step program.

    draft: the draft model's next token of every decoding request. target: the model, over decodes
    or verifications, and prefill chunks. draft_extend: the draft model over the target's rows,
    which leaves the first token of the next drafts.
    """

    DRAFT = "draft"
    TARGET = "target"
    DRAFT_EXTEND = "draft_extend"


@dataclass(frozen=True)
class Program:
    """The slots of a step; every rank runs all of them in this order, with any number of rows."""

    slots: tuple[Slot, ...]

    def __post_init__(self) -> None:
        assert len(self.slots) <= MAX_SLOTS, f"a program has at most {MAX_SLOTS} slots: {self}"
        assert self.slots.count(Slot.TARGET) == 1, f"a program has one target slot: {self}"
        drafts = self.slots.count(Slot.DRAFT)
        tail = (Slot.TARGET,) if len(self.slots) == 1 else (Slot.TARGET, Slot.DRAFT_EXTEND)
        due = (Slot.DRAFT,) * drafts + tail
        assert self.slots == due, f"drafts come before the target, draft_extend after: {self}"

    @property
    def num_drafts(self) -> int:
        """Tokens of each decoding request that are drafted, and that the target verifies."""
        return self.slots.count(Slot.DRAFT) + self.slots.count(Slot.DRAFT_EXTEND)

    def query_len(self, slot: Slot) -> int:
        """Rows of each decoding request in a slot: its last token, and its drafts to verify."""
        return 1 if slot is Slot.DRAFT else 1 + self.num_drafts

    @classmethod
    def speculative(cls, num_drafts: int) -> Program:
        """Drafts so many tokens, the first of which the last draft_extend left."""
        drafts = (Slot.DRAFT,) * (num_drafts - 1)
        return cls((*drafts, Slot.TARGET, Slot.DRAFT_EXTEND))


SERVING_PROGRAMS: tuple[Program, ...] = (Program((Slot.TARGET,)),)  # a program's id is its index


def speculative_programs(num_drafts: int, adaptive: bool) -> tuple[Program, ...]:
    """The programs of an engine that drafts num_drafts tokens, or up to so many."""
    lengths = range(1, num_drafts + 1) if adaptive else (num_drafts,)
    return tuple(Program.speculative(length) for length in lengths)
