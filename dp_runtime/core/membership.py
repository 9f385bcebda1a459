"""Membership: which ranks serve in an epoch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import count, islice


@dataclass(frozen=True)
class Membership:
    """The ranks of an epoch, ascending; a dp_rank is a name and stays, a position changes.

    Shards, collectives and records go by position, 0..size-1; users and logs know names.
    """

    dp_ranks: tuple[int, ...]  # [position]

    def __post_init__(self) -> None:
        assert self.dp_ranks, "somebody has to serve"
        assert self.dp_ranks == tuple(sorted({*self.dp_ranks})), f"{self.dp_ranks} are not in order"

    @classmethod
    def first(cls, size: int) -> Membership:
        return cls(tuple(range(size)))

    @property
    def size(self) -> int:
        return len(self.dp_ranks)

    def __str__(self) -> str:
        first, last = self.dp_ranks[0], self.dp_ranks[-1]
        if self.size > 1 and last - first == self.size - 1:
            return f"{first}..{last}"
        return ", ".join(map(str, self.dp_ranks))

    def __contains__(self, dp_rank: object) -> bool:
        return dp_rank in self.dp_ranks

    def position(self, dp_rank: int) -> int:
        return self.dp_ranks.index(dp_rank)

    def named(self, positions: Iterable[int]) -> str:
        return ", ".join(str(self.dp_ranks[position]) for position in positions)

    def besides(self, others: Membership) -> frozenset[int]:
        """Return those that are not among others."""
        return frozenset(self.dp_ranks) - frozenset(others.dp_ranks)

    def without(self, dp_ranks: Collection[int]) -> Membership:
        """Leave some out, but not all."""
        return Membership(tuple(rank for rank in self.dp_ranks if rank not in dp_ranks))

    def resized(self, size: int) -> Membership:
        """Take in the smallest free numbers, or leave out the largest."""
        if size <= self.size:
            return Membership(self.dp_ranks[:size])
        free = (number for number in count() if number not in self.dp_ranks)
        return Membership(tuple(sorted((*self.dp_ranks, *islice(free, size - self.size)))))


@dataclass(frozen=True)
class Transition:
    """What becomes of requests as the next epoch begins: those of lost and left ranks move."""

    members: Membership
    lost: frozenset[int] = frozenset()  # by a fault
    left: frozenset[int] = frozenset()  # as planned

    @property
    def gone(self) -> frozenset[int]:
        return self.lost | self.left
