"""RankGroup: the running ranks as the engine sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from dp_runtime.core.request import FailureListener, RankRequest, UpdateListener
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.trace import StepTrace, Totals


class RankGroup(Protocol):
    """The running ranks as the engine sees them, whatever kind of process they are."""

    model: ModelInfo

    def listen(self, on_progress: UpdateListener, on_failure: FailureListener) -> None:
        """Deliver outputs and the first failure, each from the group's own threads."""

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        """Queue requests on a rank; does not wait."""

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        """Stop requests of a rank; does not wait."""

    def health(self) -> tuple[RankHealth, ...]:
        """The state of every rank, also of those that do not answer."""

    def trace(self) -> tuple[StepTrace, ...]:
        """The steps that the ranks remember, ordered by step and rank."""

    def totals(self) -> tuple[Totals, ...]:
        """What every rank has counted since the start."""

    def close(self) -> None:
        """Stop all ranks and release their processes; callable more than once."""
