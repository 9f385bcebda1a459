"""What the driver counts of requests."""

import pytest

from dp_runtime.core.request import FinishReason
from dp_runtime.metrics.request_totals import RequestTotals


def test_tokens_that_come_together_share_their_time() -> None:
    totals = RequestTotals(0)
    totals.add_tokens(0.5, 2, first=True)
    totals.add_tokens(0.3, 3, first=False)
    totals.add_tokens(0.2, 1, first=False)
    assert (totals.first_token_s.count, totals.first_token_s.sum) == (1, 0.5)
    assert totals.inter_token_s.count == 4
    assert totals.inter_token_s.sum == pytest.approx(0.5)
    at_100_ms = totals.inter_token_s.bounds.index(0.1)
    assert totals.inter_token_s.counts[at_100_ms : at_100_ms + 2] == [3, 1]


def test_only_requests_that_were_served_to_the_end_have_a_duration() -> None:
    totals = RequestTotals(0)
    for reason in FinishReason:
        totals.add_end(reason, 1.5)
    assert totals.ended == dict.fromkeys(FinishReason, 1)
    assert (totals.request_s.count, totals.request_s.sum) == (2, 3.0)


def test_a_copy_stays_as_it_was() -> None:
    totals = RequestTotals(0)
    copy = totals.copied()
    totals.add_tokens(0.1, 1, first=True)
    totals.add_end(FinishReason.STOP, 0.2)
    assert copy == RequestTotals(0) != totals
