"""PerRequestState: a rank's state of a request while it has a row in the request table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dp_runtime.core.request import RankRequest


class PerRequestState(Protocol):
    """One kind of state of the requests in the table, indexed by their rows.

    A preempted request later gets another row, so `add` starts from the request and its outputs.
    """

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None: ...

    def remove(self, req_index: int) -> None:
        """Drop a row's state; no step in flight has tokens of its request any more."""

    def check(self, req_indices: Sequence[int]) -> None:
        """Assert that there is sound state for these rows, and for no others."""
