"""What a watch knows of ranks by their answers, and for how long they may be silent."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

from dp_runtime import EngineConfig
from dp_runtime.metrics.status import RankHealth, RankState
from tests.workers.leftovers import wait_until
from workers.supervision.watch import RankWatch, SilenceLimits, _Pulse


def test_a_rank_that_loads_may_be_silent_for_longer() -> None:
    limits = SilenceLimits.while_serving(EngineConfig("x", hang_timeout_s=4.0))
    rank: Any = SimpleNamespace(dp_rank=0, answered=False)
    pulse = _Pulse(rank, 0.0)
    assert pulse.limit(limits) == limits.first
    rank.answered = True
    assert pulse.limit(limits) == limits.loading == 22.5, "nobody knows yet what it does"
    for state, limit in (
        (RankState.STARTING, 22.5), (RankState.LOADING, 22.5), (RankState.COMPILING, 22.5),
        (RankState.READY, 4.5), (RankState.RUNNING, 4.5), (RankState.IDLE, 4.5),
    ):  # fmt: skip
        pulse._take(RankHealth(0, state), 0.0)
        assert pulse.limit(limits) == limit


def test_who_has_joined_does_not_load_whatever_it_answered_before() -> None:
    limits = SilenceLimits.while_serving(EngineConfig("x", hang_timeout_s=4.0))
    late: Future[RankHealth] = Future()
    rank: Any = SimpleNamespace(dp_rank=0, answered=True, call=lambda message: late)
    pulse = _Pulse(rank, 0.0)
    pulse._take(RankHealth(0, RankState.LOADING), 0.0)
    pulse.beat(0.5)
    assert pulse.limit(limits) == limits.loading
    pulse.serve(0.6)
    late.set_result(RankHealth(0, RankState.LOADING))
    pulse.beat(0.6)
    assert pulse.limit(limits) == limits.later == 4.5


def test_a_rank_that_was_silent_as_an_epoch_began_is_told_of_again_in_it() -> None:
    class Fake:
        answered = True

        def __init__(self, dp_rank: int, answer: Future[RankHealth]) -> None:
            self.dp_rank, self._answer = dp_rank, answer

        def call(self, message: object) -> Future[RankHealth]:
            return self._answer

    told: list[Sequence[int]] = []
    limits = SilenceLimits(first=2.0, later=2.0, loading=2.0)
    well: Future[RankHealth] = Future()
    well.set_result(RankHealth(0, RankState.IDLE))
    tell = lambda ranks, text: told.append(ranks)  # noqa: E731
    watch = RankWatch([Fake(0, well), Fake(1, Future())], limits, tell)
    wait_until(lambda: told == [[1]], "the silent rank is told of")
    watch.serve(limits, tell)
    wait_until(lambda: told == [[1], [1]], "it is told of in the new epoch too")
    watch.end()
