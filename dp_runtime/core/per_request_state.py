"""PerRequestState: what a rank keeps of a request as long as the request has a row in its table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dp_runtime.core.request import RankRequest


class PerRequestState(Protocol):
    """One kind of state of the requests in the request table, indexed by their rows there.

    A preempted request loses its row and gets another one later: what `add` makes has to follow
    from the request and the tokens it has generated so far.
    """

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        """Begin the state of a request that has taken this row, after these output tokens."""

    def remove(self, req_index: int) -> None:
        """Drop the state of this row; no launched step has tokens of its request any more."""

    def check(self, req_indices: Sequence[int]) -> None:
        """Assert that there is state for these rows, sound, and for no others."""
