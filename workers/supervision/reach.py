"""The health of ranks that may not answer."""

from __future__ import annotations

from concurrent.futures import Future

from dp_runtime.metrics.status import RankHealth, RankState


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
