"""MembershipChanges: another number of ranks, or others, while an engine serves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic, sleep
from typing import Protocol

from dp_runtime.core.membership import Membership
from dp_runtime.core.plain_values import plain_float, plain_int
from dp_runtime.engine.routing.admission import Admission
from dp_runtime.errors import ResizeFailed, require

MAX_RANKS = 4096
MAX_DRAIN_S = 86_400.0
DRAINED_EVERY_S = 0.02

TargetOf = Callable[[Membership], Membership]


class ChangingRanks(Protocol):
    @property
    def members(self) -> Membership: ...

    def change(self, target: Membership) -> None: ...


class MembershipChanges:
    """Makes one change at a time; leaving ranks get no new requests meanwhile.

    What they still have goes on at others from the tokens that were delivered, also what was
    pinned to them.
    """

    def __init__(
        self, group: ChangingRanks, admission: Admission, check_open: Callable[[], None]
    ) -> None:
        self._group, self._admission, self._check_open = group, admission, check_open
        self._changing = threading.Lock()

    def resize(self, dp_size: object) -> Membership:
        """Serve with so many ranks; new ones get the smallest free numbers, the largest leave."""
        size = plain_int(dp_size)
        ok = size is not None and 1 <= size <= MAX_RANKS
        require(ok, "dp_size", dp_size, f"a number of ranks, 1..{MAX_RANKS}")
        assert size is not None, "checked above"
        return self._change(lambda members: members.resized(size), 0.0)

    def drain(self, dp_rank: object, timeout_s: object) -> Membership:
        """Serve without a rank, whose requests have so many seconds to end before they move."""
        rank, seconds = plain_int(dp_rank), plain_float(timeout_s)
        ok = seconds is not None and 0 <= seconds <= MAX_DRAIN_S
        require(ok, "timeout_s", timeout_s, f"seconds, 0..{MAX_DRAIN_S:g}")
        assert seconds is not None, "checked above"

        def without(members: Membership) -> Membership:
            require(rank in members, "dp_rank", dp_rank, f"a rank in {members}")
            require(members.size > 1, "dp_rank", dp_rank, "one of several: the last rank can't go")
            assert rank is not None, "checked above"
            return members.without({rank})

        return self._change(without, seconds)

    def _change(self, target_of: TargetOf, timeout_s: float) -> Membership:
        if not self._changing.acquire(blocking=False):
            raise ResizeFailed("another change of the ranks is under way")
        try:
            self._check_open()
            members = self._group.members
            target = target_of(members)
            leaving = members.besides(target)
            self._admission.spare(leaving)
            until = monotonic() + timeout_s
            while monotonic() < until and self._admission.num_unfinished_of(leaving):
                self._check_open()
                sleep(DRAINED_EVERY_S)
            self._group.change(target)
        finally:
            self._admission.spare(())
            self._changing.release()
        return self._group.members
