"""Skew: which rank each conversation is pinned to, in exact numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.plain_values import plain_int
from dp_runtime.core.settings import setting
from dp_runtime.errors import require
from dp_runtime.experiments.tables import Checked

Ranks = Sequence[int | None]  # [conversations] None: the engine's routing chooses


def read_counts(value: object) -> tuple[int, ...] | None:
    """Read a list of integers >= 0; None for anything else."""
    if not isinstance(value, list | tuple):
        return None
    counts = [number for each in value if (number := plain_int(each)) is not None]
    return tuple(counts) if len(counts) == len(value) and min(counts, default=-1) >= 0 else None


@dataclass(frozen=True)
class Skew(Checked, ABC):
    @abstractmethod
    def ranks(self, count: int, dp_size: int, rng: np.random.Generator) -> Ranks:
        """Return the rank of each conversation, in the order of arrival."""


@dataclass(frozen=True)
class Routed(Skew):
    def ranks(self, count: int, dp_size: int, rng: np.random.Generator) -> Ranks:
        return [None] * count


@dataclass(frozen=True)
class Shares(Skew):
    """Every rank gets an exact number, in random order."""

    def ranks(self, count: int, dp_size: int, rng: np.random.Generator) -> Ranks:
        ranks = np.repeat(np.arange(dp_size), self.counts(count, dp_size))
        return [int(rank) for rank in rng.permutation(ranks)]

    @abstractmethod
    def counts(self, count: int, dp_size: int) -> NDArray[np.int64]:
        """Return how many each rank gets, which adds up to all."""


@dataclass(frozen=True)
class Zipf(Shares):
    """Rank i gets a part in proportion to 1 / (i + 1)^exponent; 0 is even."""

    exponent: float = setting(1.0, "how steep it is", at_least=0, at_most=20)

    def counts(self, count: int, dp_size: int) -> NDArray[np.int64]:
        weights = [(rank + 1) ** -self.exponent for rank in range(dp_size)]
        return apportion(count, np.array(weights))


@dataclass(frozen=True)
class OneHot(Shares):
    """One rank gets a share of all, the others the rest in equal parts."""

    rank: int = setting(0, "the hot rank", at_least=0)
    share: float = setting(0.5, "its share of all conversations", at_least=0, at_most=1)

    def counts(self, count: int, dp_size: int) -> NDArray[np.int64]:
        require(self.rank < dp_size, "rank", self.rank, f"a rank of 0..{dp_size - 1}")
        return apportion(count, hot_weights(self.rank, self.share, dp_size))


@dataclass(frozen=True)
class Alternating(Skew):
    """Each rank in turn is the hot one, for so many conversations."""

    period: int = setting(16, "conversations until the next rank is hot", at_least=1)
    share: float = setting(0.75, "the hot rank's share of them", at_least=0, at_most=1)

    def ranks(self, count: int, dp_size: int, rng: np.random.Generator) -> Ranks:
        ranks: list[int | None] = []
        while len(ranks) < count:
            hot = len(ranks) // self.period % dp_size
            size = min(self.period, count - len(ranks))
            block = apportion(size, hot_weights(hot, self.share, dp_size))
            drawn = rng.permutation(np.repeat(np.arange(dp_size), block))
            ranks += [int(rank) for rank in drawn]
        return ranks


@dataclass(frozen=True)
class Counts(Shares):
    """Each rank gets exactly so many."""

    conversations: tuple[int, ...] = setting(
        MISSING, "conversations of each rank", allowed="a list of integers >= 0, one for each rank",
        read=read_counts,
    )  # fmt: skip

    def counts(self, count: int, dp_size: int) -> NDArray[np.int64]:
        given, allowed = self.conversations, f"{dp_size} numbers that add up to {count}"
        ok = len(given) == dp_size and sum(given) == count
        require(ok, "conversations", list(given), allowed)
        counts: NDArray[np.int64] = np.array(given)
        return counts


def hot_weights(hot: int, share: float, dp_size: int) -> NDArray[np.float64]:
    weights = np.full(dp_size, (1 - share) / max(dp_size - 1, 1))
    weights[hot] = share if dp_size > 1 else 1.0
    return weights


def apportion(count: int, weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Split a number in proportion to weights, by largest remainders."""
    exact: NDArray[np.float64] = count * weights / weights.sum()
    counts: NDArray[np.int64] = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(counts - exact, kind="stable")
    counts[by_remainder[: count - counts.sum()]] += 1
    return counts


SKEWS: Mapping[str, type[Skew]] = {
    "routed": Routed, "zipf": Zipf, "one_hot": OneHot, "alternating": Alternating, "counts": Counts,
}  # fmt: skip
