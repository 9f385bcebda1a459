"""How far a group of ranks is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from workers.messages import AnyRendezvous


class Phase(IntEnum):
    """How far a group is; it never goes back."""

    STARTING = 0
    SERVING = 1
    FAILED = 2
    CLOSED = 3


@dataclass(frozen=True)
class GroupState:
    phase: Phase = Phase.STARTING
    epoch: int = 0
    rendezvous: AnyRendezvous | None = None  # of the epoch
