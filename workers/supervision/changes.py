"""Changes: who is to serve, and attempts to bring back who does not."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from dp_runtime.core.membership import Membership
from dp_runtime.errors import EngineClosed, RankFailed, ResizeFailed
from workers.supervision.epochs import WhyNot

GIVE_WAY_S = 20.0  # for an attempt to restore ranks to end
RESTORE_S, MAX_RESTORE_S = 5.0, 60.0  # between such attempts: at first, and doubled up to this

_log = logging.getLogger(__name__)


class Changes:
    """Makes what is asked for, and restores what was lost, in a thread of its own.

    `change` makes ranks serve, or raises and leaves those that do.
    """

    def __init__(
        self,
        change: Callable[[Membership, WhyNot], None],
        members: Callable[[], Membership],
        over: threading.Event,
    ) -> None:
        self._change, self._members, self._over = change, members, over
        self.wanted = members()
        self._turn = threading.Lock()  # of a change, for which one that restores ranks gives way
        self._asked = threading.Event()  # a change waits for its turn
        self._restoring = threading.Lock()

    def make(self, target: Membership, why_not: WhyNot) -> None:
        self._asked.set()  # an attempt to restore ranks gives way
        try:
            if not self._turn.acquire(timeout=GIVE_WAY_S):
                raise ResizeFailed("missing ranks are started, and that does not give way")
        finally:
            self._asked.clear()
        try:
            self._change(target, why_not)
            self.wanted = target
        finally:
            self._turn.release()
        self.restore_later()

    def restore_later(self) -> None:
        """Try to start missing ranks, if there are any, until they are back."""
        if self._members() != self.wanted and self._restoring.acquire(blocking=False):
            threading.Thread(target=self._restore, name="restore-ranks", daemon=True).start()

    def _restore(self) -> None:
        pause_s = RESTORE_S
        gives_way = lambda: "another change comes first" if self._asked.is_set() else ""  # noqa: E731
        while not self._over.wait(pause_s) and self._members() != self.wanted:
            with self._turn:
                try:
                    self._change(self.wanted, gives_way)
                except (ResizeFailed, ValueError) as error:
                    _log.info("missing ranks are not back: %s", error)
                except (EngineClosed, RankFailed):
                    break
            pause_s = min(2 * pause_s, MAX_RESTORE_S)
        self._restoring.release()
