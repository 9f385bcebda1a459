"""HeldRequests: those of a replay, each of which its rank has before its step comes."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from dp_runtime.core.request import RankRequest


class HeldRequests:
    def __init__(self) -> None:
        self._held: deque[RankRequest] = deque()  # in the order of their steps

    def __bool__(self) -> bool:
        return bool(self._held)

    def due(self, added: Sequence[RankRequest], step_id: int) -> list[RankRequest]:
        """Take in new requests, and return all whose step has come."""
        due = [request for request in added if request.at_step <= step_id]
        self._held += [request for request in added if request.at_step > step_id]
        while self._held and self._held[0].at_step <= step_id:
            due.append(self._held.popleft())
        return due
