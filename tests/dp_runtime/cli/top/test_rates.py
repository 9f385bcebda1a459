"""What ranks did between two pages."""

from dataclasses import replace

import pytest

from dp_runtime.cli.top.rates import Interval, RankRow
from dp_runtime.cli.top.scrape import Scrape
from dp_runtime.errors import ServerSilent
from tests.dp_runtime.cli.top.pages import after, rank_after, scrape


def test_a_row_is_of_the_interval() -> None:
    interval = Interval(after(100.0, 10), after(102.0, 30))
    waiting, slowest = (RankRow.of(interval, rank) for rank in ("0", "1"))
    assert waiting.output_per_s == pytest.approx(20 * 2 / 2.0)
    assert slowest.output_per_s == pytest.approx(20 * 3 / 2.0)
    for row in (waiting, slowest):
        assert row.step_s == pytest.approx(0.020)
        assert row.accepted == pytest.approx(1.0)
        assert row.kv_share == pytest.approx(0.25)
        assert (row.state, row.running) == ("running", 3)
    assert waiting.wait_share == pytest.approx(0.25)
    assert (waiting.waits_for, slowest.waits_for, slowest.wait_share) == ("1", None, 0.0)
    assert waiting.padding_share == pytest.approx(0.75)
    assert slowest.padding_share == pytest.approx(0.25)
    assert (waiting.preemptions, slowest.preemptions, slowest.queued) == (0, 4, 1)


def test_without_steps_there_is_nothing_to_divide_by() -> None:
    row = RankRow.of(Interval(after(0.0, 5), after(2.0, 5)), "0")
    assert (row.step_s, row.wait_share, row.padding_share, row.accepted) == (None,) * 4
    assert row.output_per_s == 0.0


def test_since_the_start_there_are_means_but_no_rates() -> None:
    row = RankRow.of(Interval(None, after(2.0, 5)), "0")
    assert row.output_per_s is None
    assert row.step_s == pytest.approx(0.020)


def test_a_server_that_started_anew_counts_from_zero() -> None:
    assert Interval(after(0.0, 50), after(2.0, 4)).rise("dp_runtime_steps_total", dp_rank="0") == 4


def test_a_quantile_lies_within_its_bucket() -> None:
    interval = Interval(None, after(2.0, 10))
    for share in (0.01, 0.5, 0.99, 1.0):
        first = interval.quantile("dp_runtime_first_token_seconds", share)
        assert first is not None
        assert 0.2 < first <= 0.3
    assert interval.quantile("dp_runtime_queue_seconds", 0.5) is None, "nobody queued"


def test_a_quantile_of_what_is_above_all_bounds_is_the_last_bound() -> None:
    rank = rank_after(0, 1)
    rank.requests.first_token_s.add(1e9, times=99)
    interval = Interval(None, scrape(0.0, rank))
    assert interval.quantile("dp_runtime_first_token_seconds", 0.99) == 5000.0


def test_a_rank_that_does_not_answer_is_silent() -> None:
    last = scrape(2.0, rank_after(0, 5), rank_after(1, 5, answered=False))
    rows = [RankRow.of(Interval(None, last), rank) for rank in last.dp_ranks]
    assert [row.state for row in rows] == ["running", "silent"]


@pytest.mark.parametrize(
    ("page", "health"),
    [
        ("up 1\n", "{}"),
        ("dp_runtime_steps_total{dp_rank=\n", "{}"),
        ('dp_runtime_steps_total{dp_rank="0"} 1\n', "[]"),
        ('dp_runtime_steps_total{dp_rank="0"} 1\n', "<html>"),
    ],
)
def test_what_another_server_says_is_refused(page: str, health: str) -> None:
    with pytest.raises(ServerSilent, match=r"/health"):
        Scrape.parsed(page, health)


def test_ranks_are_in_the_order_of_their_numbers() -> None:
    ranks = [rank_after(0, 1) for _ in range(12)]
    numbered = [
        replace(rank, totals=replace(rank.totals, dp_rank=number))
        for number, rank in enumerate(ranks)
    ]
    assert scrape(0.0, *numbered).dp_ranks == [str(number) for number in range(12)]
