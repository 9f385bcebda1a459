"""Asking ranks for their metrics, some of which do not answer."""

from concurrent.futures import Future
from typing import Any, TypeVar

from dp_runtime.errors import RankFailed
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankMetrics
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Totals
from workers.messages import ExportMetrics, Message
from workers.supervision.metrics_calls import MetricsCalls

Answer = TypeVar("Answer")


class FakeRank:
    def __init__(self, dp_rank: int) -> None:
        self.dp_rank = dp_rank
        self.questions: list[Future[Any]] = []
        self.asked: list[Message[Any]] = []

    def call(self, message: Message[Answer]) -> Future[Answer]:
        future: Future[Answer] = Future()
        self.asked.append(message)
        self.questions.append(future)
        return future

    def kill(self) -> None: ...

    def answer(self, steps: int) -> None:
        health = RankHealth(self.dp_rank, RankState.RUNNING, last_step_age_s=0.25)
        self.questions[-1].set_result(RankMetrics(health, Totals(self.dp_rank, steps=steps)))


def numbers(calls: MetricsCalls) -> list[tuple[int, bool]]:
    return [(rank.totals.steps, answered) for rank, answered in calls.read(0.001)]


def test_a_rank_that_hangs_is_asked_once_and_keeps_its_numbers() -> None:
    quick, slow = FakeRank(0), FakeRank(1)
    calls = MetricsCalls(lambda: [quick, slow])
    assert numbers(calls) == [(0, False), (0, False)]
    quick.answer(3)
    slow.answer(4)
    assert numbers(calls) == [(3, True), (4, True)]
    for _ in range(3):
        assert numbers(calls) == [(3, False), (4, False)]
    assert [len(quick.questions), len(slow.questions)] == [2, 2]
    slow.answer(5)
    assert numbers(calls) == [(3, False), (5, True)]


def test_the_age_of_a_step_goes_on_while_a_rank_is_silent() -> None:
    rank = FakeRank(0)
    calls = MetricsCalls(lambda: [rank])
    calls.read(0.0)
    rank.answer(1)
    ages = [calls.read(0.001)[0][0].health.last_step_age_s for _ in range(3)]
    assert ages == sorted(ages)
    assert 0.25 <= ages[0] < ages[-1]


def test_a_rank_that_has_ended_does_not_answer_and_is_asked_again() -> None:
    rank = FakeRank(0)
    calls = MetricsCalls(lambda: [rank])
    calls.read(0.0)
    rank.questions[-1].set_exception(RankFailed("the process of rank 0 ended"))
    assert numbers(calls) == [(0, False)]
    calls.read(0.0)
    rank.answer(6)
    assert numbers(calls) == [(6, True)]


def test_a_rank_that_still_exports_is_not_asked_again() -> None:
    quick, slow = ranks = FakeRank(0), FakeRank(1)
    calls = MetricsCalls(lambda: ranks)
    requests = {0: RequestTotals(0), 1: RequestTotals(1)}
    calls.export(requests)
    quick.questions[-1].set_result(None)
    calls.export(requests)
    assert quick.asked == [ExportMetrics(requests[0])] * 2
    assert slow.asked == [ExportMetrics(requests[1])]
