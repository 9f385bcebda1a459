"""GroupState: the phase of a group of ranks, which never goes back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from workers.messages import AnyRendezvous


class Phase(IntEnum):
    STARTING = 0
    SERVING = 1
    FAILED = 2
    CLOSED = 3


@dataclass(frozen=True)
class GroupState:
    phase: Phase = Phase.STARTING
    epoch: int = 0
    rendezvous: AnyRendezvous | None = None  # of the epoch
