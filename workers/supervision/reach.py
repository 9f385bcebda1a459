"""Questions to ranks that may not answer."""

from __future__ import annotations

import logging
from concurrent.futures import Future, wait

from collectives.awake_clock import Deadline
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace
from workers.messages import Message, ReadHealth, ReadTotals, ReadTrace
from workers.ranks import Ranks, Sent

STATUS_S = 5.0
_log = logging.getLogger(__name__)


def health_of_all(ranks: Ranks, timeout_s: float) -> tuple[RankHealth, ...]:
    return tuple(health_of(*answer) for answer in _ask(ranks, ReadHealth(), timeout_s).items())


def trace_of_all(ranks: Ranks) -> tuple[StepTrace, ...]:  # by step and rank, of who answers
    steps: list[StepTrace] = []
    for dp_rank, answer in _ask(ranks, ReadTrace(), STATUS_S).items():
        if answer.done() and answer.exception() is None:
            steps += answer.result()
        else:
            _log.warning("rank %d does not tell of its steps", dp_rank)
    return tuple(sorted(steps, key=lambda step: (step.step_id, step.dp_rank)))


def totals_of_all(ranks: Ranks) -> tuple[Totals, ...]:
    return tuple(ranks.all(ReadTotals(), Deadline(STATUS_S)))


def _ask(ranks: Ranks, message: Message[Sent], timeout_s: float) -> dict[int, Future[Sent]]:
    """Return the answers by dp_rank, those that came in time and those that did not."""
    asked = {seat.dp_rank: seat.call(message) for seat in ranks.seats}
    wait(asked.values(), timeout_s)
    return asked


def in_child(dp_rank: int, owner: int) -> RankHealth:
    error = f"the engine belongs to process {owner}; a forked child can not use it"
    return RankHealth(dp_rank, RankState.UNREACHABLE, error=error)


def health_of(dp_rank: int, future: Future[RankHealth]) -> RankHealth:
    if not future.done():
        return RankHealth(dp_rank, RankState.UNREACHABLE, error="does not answer")
    error = future.exception()
    if error is not None:
        return RankHealth(dp_rank, RankState.UNREACHABLE, error=str(error))
    return future.result()
