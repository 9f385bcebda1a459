"""Asking ranks for their metrics, some of which do not answer."""

from concurrent.futures import Future

from dp_runtime.errors import RankFailed
from dp_runtime.metrics.snapshot import RankMetrics
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Totals
from workers.messages import Message
from workers.supervision.metrics_reader import MetricsReader


class FakeRank:
    def __init__(self, dp_rank: int) -> None:
        self.dp_rank = dp_rank
        self.questions: list[Future[RankMetrics]] = []

    def call(self, message: Message[RankMetrics]) -> Future[RankMetrics]:
        self.questions.append(Future())
        return self.questions[-1]

    def answer(self, steps: int) -> None:
        health = RankHealth(self.dp_rank, RankState.RUNNING, last_step_age_s=0.25)
        self.questions[-1].set_result(RankMetrics(health, Totals(self.dp_rank, steps=steps)))


def numbers(reader: MetricsReader) -> list[tuple[int, bool]]:
    return [(rank.totals.steps, answered) for rank, answered in reader.read(0.001)]


def test_a_rank_that_hangs_is_asked_once_and_keeps_its_numbers() -> None:
    quick, slow = FakeRank(0), FakeRank(1)
    reader = MetricsReader([quick, slow])
    assert numbers(reader) == [(0, False), (0, False)]
    quick.answer(3)
    slow.answer(4)
    assert numbers(reader) == [(3, True), (4, True)]
    for _ in range(3):
        assert numbers(reader) == [(3, False), (4, False)]
    assert [len(quick.questions), len(slow.questions)] == [2, 2]
    slow.answer(5)
    assert numbers(reader) == [(3, False), (5, True)]


def test_the_age_of_a_step_goes_on_while_a_rank_is_silent() -> None:
    rank = FakeRank(0)
    reader = MetricsReader([rank])
    reader.read(0.0)
    rank.answer(1)
    ages = [reader.read(0.001)[0][0].health.last_step_age_s for _ in range(3)]
    assert ages == sorted(ages)
    assert 0.25 <= ages[0] < ages[-1]


def test_a_rank_that_has_ended_does_not_answer_and_is_asked_again() -> None:
    rank = FakeRank(0)
    reader = MetricsReader([rank])
    reader.read(0.0)
    rank.questions[-1].set_exception(RankFailed("the process of rank 0 ended"))
    assert numbers(reader) == [(0, False)]
    reader.read(0.0)
    rank.answer(6)
    assert numbers(reader) == [(6, True)]
