"""A sequence of turns that the ranks of one host take together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

from collectives.awake_clock import LOOK_EVERY_S, Deadline
from collectives.shared_memory.doorbell import Doorbell
from collectives.shared_memory.region import Region
from collectives.shared_memory.rendezvous import ATTACHED
from dp_runtime.core.membership import Membership
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout

CLOSED = "this rank has closed its group"


class Channel:
    """Turns that all ranks take together, each by publishing and then waiting for all others.

    Two buffers suffice since every rank waits for all, also for those that bring no rows:
    docs/collectives.md.
    """

    def __init__(
        self, region: Region, bell: Doorbell, timeout_s: float, members: Membership
    ) -> None:
        self.region, self.bell = region, bell
        self._members = members
        self.turn = ATTACHED  # NOTE: a fast peer may have rung for its next turn already
        self.waited_s = 0.0
        self.in_use = threading.Lock()  # held by a rank's thread for the length of a call
        self._timeout_s = timeout_s
        self._broken: str | None = None

    def raise_if_failed(self) -> None:
        reason = self._broken or self.region.abort_reason()
        if reason is not None:
            raise CollectiveAborted(reason)

    def begin(self) -> int:
        self.raise_if_failed()
        self.turn += 1
        return self.turn

    def finish(self, what: str) -> None:
        self.bell.ring(self.turn)
        self.wait(what, lambda: self.bell.missing(self.turn))

    def wait(
        self,
        what: str,
        missing: Callable[[], list[int]],
        look_every_s: float | None = None,
        num_yields: int = 0,
    ) -> None:
        """Yield num_yields times, then sleep until no rank is missing; look every look_every_s."""
        start = time.monotonic()
        deadline = Deadline(self._timeout_s)
        pause = look_every_s or LOOK_EVERY_S
        try:
            while ranks := missing():
                left = deadline.left()
                if left <= 0:
                    self._time_out(what, ranks)
                if num_yields > 0:
                    num_yields -= 1
                    os.sched_yield()
                else:
                    self.bell.listen(min(left, pause))
                    self.raise_if_failed()
        finally:
            self.waited_s += time.monotonic() - start

    def close(self) -> None:
        """Free the thread that waits here, then close the FIFOs."""
        self._broken = CLOSED
        self.bell.rouse()
        with self.in_use:
            self.bell.close()

    def _time_out(self, what: str, missing: list[int]) -> None:
        names = self._members.named(missing)
        message = f"{what}: waited {self._timeout_s:g} s for ranks {names}"
        self._broken = f"timed out before ({message})"
        raise CollectiveTimeout(message)
