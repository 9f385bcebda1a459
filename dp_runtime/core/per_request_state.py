"""PerRequestState: what a rank keeps of a request while it has a row in the request table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dp_runtime.core.request import RankRequest


class PerRequestState(Protocol):
    """One kind of state of the requests in the table, indexed by their rows.

    A preempted request loses its row and gets another later: what `add` makes follows from the
    request and its outputs so far.
    """

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        """Begin the state of a request that has taken this row, after these output tokens."""

    def remove(self, req_index: int) -> None:
        """Drop a row's state; no step in flight has tokens of its request any more."""

    def check(self, req_indices: Sequence[int]) -> None:
        """Assert that there is state for these rows, sound, and for no others."""
