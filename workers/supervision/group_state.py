"""GroupState: the phase of a group of ranks, and who belongs to it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Phase(IntEnum):
    STARTING = 0
    SERVING = 1
    FAILED = 2
    CLOSED = 3


@dataclass(frozen=True)
class Evidence:
    """What was seen of a fault; that alone changes no membership."""

    text: str
    dp_rank: int | None = None  # the rank at fault, where that is certain


@dataclass(frozen=True)
class GroupState:
    """The phase never goes back. While an epoch ends, the ranks that it has lost are known."""

    phase: Phase = Phase.STARTING
    epoch: int = 0
    recovering: bool = False  # or between two epochs as planned
    lost: frozenset[int] = frozenset()  # whose requests wait for a new epoch
    left: frozenset[int] = frozenset()  # the same, as planned

    @property
    def gone(self) -> frozenset[int]:
        return self.lost | self.left
