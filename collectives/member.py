"""The collective and the board of a rank are members of one group: they fail and end together."""

from __future__ import annotations

from typing import Protocol


class Group(Protocol):
    """One rank's end of a group."""

    def raise_if_failed(self) -> None: ...  # CollectiveAborted or CollectiveTimeout

    def abort(self, reason: str) -> None:
        """Free all waiters with CollectiveAborted, from any thread; the first reason stays."""

    def close(self) -> None:
        """Leave the group, once or again: own waiters are freed, peers are not told."""


class GroupMember:
    """The collective or the board of one rank; each method acts on the whole group."""

    def __init__(self, group: Group, dp_rank: int, dp_size: int) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._group = group

    def raise_if_failed(self) -> None:
        self._group.raise_if_failed()

    def abort(self, reason: str) -> None:
        self._group.abort(reason)

    def close(self) -> None:
        self._group.close()
