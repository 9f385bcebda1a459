"""Lengths: how many tokens a prompt or an output has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.settings import setting
from dp_runtime.errors import require
from dp_runtime.experiments.tables import Checked
from dp_runtime.experiments.workload.number_file import read_numbers

Tokens = NDArray[np.int64]  # [requests], 1 at least


@dataclass(frozen=True)
class Lengths(Checked, ABC):
    """Numbers of tokens; every draw comes from the generator that is given."""

    @abstractmethod
    def draw(self, count: int, rng: np.random.Generator) -> Tokens: ...


@dataclass(frozen=True)
class Fixed(Lengths):
    tokens: int = setting(MISSING, "tokens of each", at_least=1)

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        return np.full(count, self.tokens)


@dataclass(frozen=True)
class LogUniform(Lengths):
    """As many lengths between 16 and 32 as between 512 and 1,024: a few are long."""

    shortest: int = setting(MISSING, "fewest tokens", at_least=1)
    longest: int = setting(MISSING, "most tokens", at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.shortest <= self.longest
        require(ok, "longest", self.longest, f"at least shortest, {self.shortest}")

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        drawn = np.exp(rng.uniform(np.log(self.shortest), np.log(self.longest), count))
        return np.clip(drawn.round().astype(np.int64), self.shortest, self.longest)


@dataclass(frozen=True)
class Empirical(Lengths):
    """Lengths drawn, with replacement, from those in a file."""

    path: str = setting(MISSING, "text file, a length in each line", allowed="the path of a file")
    column: str | None = setting(None, "column of a CSV file, if it is one")

    def draw(self, count: int, rng: np.random.Generator) -> Tokens:
        lengths = read_numbers(Path(self.path), self.column)
        ok = bool((lengths >= 1).all() and (lengths == lengths.round()).all())
        require(ok, "path", self.path, "a file of integers >= 1")
        return rng.choice(lengths.astype(np.int64), count)


LENGTHS: Mapping[str, type[Lengths]] = {
    "fixed": Fixed, "log_uniform": LogUniform, "empirical": Empirical,
}  # fmt: skip
