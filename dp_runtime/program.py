"""Step programs: which forwards a step consists of, in which order, on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MAX_SLOTS = 8


class Slot(StrEnum):
    """One forward of a step program."""

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


# A program's id is its index here. Speculation adds programs with draft slots.
SERVING_PROGRAMS: tuple[Program, ...] = (Program((Slot.TARGET,)),)
