"""Arrivals: when the conversations of a workload begin."""

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

Seconds = NDArray[np.float64]  # [conversations] after the start, ascending


@dataclass(frozen=True)
class Arrivals(Checked, ABC):
    """When conversations begin; every draw comes from the generator that is given."""

    @abstractmethod
    def times(self, count: int, rng: np.random.Generator) -> Seconds: ...


@dataclass(frozen=True)
class AllAtOnce(Arrivals):
    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        return np.zeros(count)


@dataclass(frozen=True)
class Poisson(Arrivals):
    """Independent arrivals: gaps are exponential, with a coefficient of variation of 1."""

    rate: float = setting(MISSING, "arrivals a second, on average", above=0)

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        return rng.exponential(1 / self.rate, count).cumsum()


@dataclass(frozen=True)
class Gamma(Arrivals):
    """Gaps follow a gamma distribution: bursts where cv is above 1, even gaps below it."""

    rate: float = setting(MISSING, "arrivals a second, on average", above=0)
    cv: float = setting(1.0, "standard deviation of the gaps over their mean", above=0, at_most=100)

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        shape = self.cv**-2
        return rng.gamma(shape, 1 / (shape * self.rate), count).cumsum()


@dataclass(frozen=True)
class ArrivalTrace(Arrivals):
    """Times of a file, a number of seconds in each line; the first is the start."""

    path: str = setting(MISSING, "text file", allowed="the path of a file")
    rate_scale: float = setting(1.0, "factor on the rate of arrivals", above=0)

    def times(self, count: int, rng: np.random.Generator) -> Seconds:
        times = np.sort(read_numbers(Path(self.path), None))
        require(len(times) >= count, "path", self.path, f"a file of {count} times at least")
        return scaled_times(times[:count], self.rate_scale)


def scaled_times(times: Seconds, rate_scale: float) -> Seconds:
    """Let the first be the start, and the rate so many times as high."""
    since: Seconds = (times - times[0]) / rate_scale
    return since


ARRIVALS: Mapping[str, type[Arrivals]] = {
    "all_at_once": AllAtOnce, "poisson": Poisson, "gamma": Gamma, "trace": ArrivalTrace,
}  # fmt: skip
