"""The health of all ranks as a server tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.metrics.status import RankHealth, RankState

SERVING = (RankState.RUNNING, RankState.IDLE, RankState.CAPTURING)


@dataclass(frozen=True)
class HealthReport:
    """`ranks` are for JSON; the engine can serve only if every rank can."""

    can_serve: bool
    ranks: tuple[dict[str, str | int | float | None], ...]

    @classmethod
    def of(cls, ranks: Sequence[RankHealth]) -> HealthReport:
        can_serve = bool(ranks) and all(rank.state in SERVING for rank in ranks)
        return cls(can_serve, tuple(map(_describe, ranks)))


def _describe(rank: RankHealth) -> dict[str, str | int | float | None]:
    return {
        "dp_rank": rank.dp_rank,
        "state": rank.state,
        "epoch": rank.epoch,
        "dp_size": rank.dp_size,
        "last_step": rank.last_step,
        "last_step_age_s": round(rank.last_step_age_s, 3),
        "graphs_captured": rank.graphs_captured,
        "graphs_total": rank.graphs_total,
        "running": rank.num_running,
        "queued": rank.num_queued,
        "host": rank.host,
        "pid": rank.pid or None,  # `kill -9 0` would end the whole job of who reads it
        "error": rank.error,
    }
