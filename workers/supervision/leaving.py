"""The orderly end: all ranks leave their steps together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, wait

from collectives.awake_clock import LOOK_EVERY_S, Deadline
from workers.messages import Stop
from workers.ranks import Ranks
from workers.supervision.watch import RankWatch

STOP_S = 12.0
LEAVE_SILENCE_S = 2.0  # a rank that leaves answers meanwhile


def leave_together(ranks: Ranks, watch: RankWatch | None, given_up: Callable[[], bool]) -> None:
    """Let all ranks stop, unless one has ended or does not answer any more."""
    leaving = [seat.call(Stop()) for seat in ranks.seats]
    deadline = Deadline(STOP_S)
    while deadline.left() > 0 and not given_up():
        done, pending = wait(leaving, LOOK_EVERY_S, FIRST_EXCEPTION)
        lost = watch.silent(LEAVE_SILENCE_S) if watch else []
        if not pending or lost or any(future.exception() for future in done):
            return
