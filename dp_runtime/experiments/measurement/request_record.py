"""RequestRecord: what was asked once, and when the answer came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RequestRecord:
    """A request of a run; times in seconds after the run's start."""

    conversation: int
    turn: int
    dp_rank: int  # that it was on at last; -1 of one that had none
    prompt_tokens: int
    planned_s: float  # when it was to be asked
    submitted_s: float
    arrivals: tuple[tuple[float, int], ...]  # when tokens came, and how many at once
    error: str = ""

    @property
    def output_tokens(self) -> int:
        return sum(count for _, count in self.arrivals)

    @property
    def ttft_s(self) -> float:
        return self.arrivals[0][0] - self.submitted_s

    @property
    def e2e_s(self) -> float:
        return self.arrivals[-1][0] - self.submitted_s

    @property
    def tpot_s(self) -> float:
        """Return the mean seconds of a token after the first arrival; nan if there is none."""
        later = sum(count for _, count in self.arrivals[1:])
        return (self.arrivals[-1][0] - self.arrivals[0][0]) / later if later else float("nan")

    @property
    def itl_s(self) -> NDArray[np.float64]:
        """Return the gap before each token after the first arrival; those of one come evenly."""
        times = np.array([at_s for at_s, _ in self.arrivals])
        counts = np.array([count for _, count in self.arrivals[1:]], np.int64)
        gaps: NDArray[np.float64] = np.repeat(np.diff(times) / counts, counts)
        return gaps


def answered(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    return [record for record in records if not record.error]
