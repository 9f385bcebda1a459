"""Requests whose ranks are lost again and again: who is served goes on, who is not may be why."""

from __future__ import annotations

import pytest

from dp_runtime import RequestHandle, SamplingParams
from dp_runtime.core.membership import Transition
from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate
from dp_runtime.engine.routing.relocation import MAX_REPLAYS
from dp_runtime.errors import RequestFailed
from tests.dp_runtime.engine.fake_group import FakeGroup, fake_engine, outstanding

MANY = SamplingParams(max_tokens=20, ignore_eos=True)


def lose(group: FakeGroup, dp_rank: int) -> int:
    """Lose a rank, whose successor serves in the next epoch; losses put down to a request."""

    def resume(again: dict[int, list[RankRequest]]) -> None:
        for rank, requests in again.items():
            group.submit(rank, requests)

    for request_id in [one for one, (rank, _) in group.taken.items() if rank == dp_rank]:
        group.taken.pop(request_id)
    return group.on_transition(Transition(group.members, lost=frozenset({dp_rank})), resume)


def say(group: FakeGroup, handle: RequestHandle, token: int) -> None:
    count = len(handle.token_ids)
    group.on_progress(handle.dp_rank, [RequestUpdate(handle.request_id, count, (token,))])


def test_a_request_that_gets_on_outlives_any_number_of_losses() -> None:
    with fake_engine() as (engine, group):
        served = engine.submit([1], MANY, 0)
        for token in range(2 * MAX_REPLAYS + 2):
            say(group, served, token)
            assert lose(group, 0) == 0
            assert not served.done
            _, again = group.taken[served.request_id]
            assert again.outputs == tuple(range(token + 1))


def test_a_request_without_a_token_between_losses_fails_alone() -> None:
    with fake_engine() as (engine, group):
        suspect, other = engine.submit([1], MANY, 0), engine.submit([2], MANY, 1)
        say(group, suspect, 5)
        for _ in range(MAX_REPLAYS):
            assert lose(group, 0) == 0
            assert not suspect.done
        assert lose(group, 0) == MAX_REPLAYS + 1
        with pytest.raises(RequestFailed, match="4 ranks were lost before it had another token"):
            suspect.result(1)
        assert not other.done
        assert [*group.taken] == [other.request_id]


def test_an_abort_that_no_rank_answers_ends_the_request_with_what_was_delivered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fake_engine() as (engine, group):
        handle, other = engine.submit([1], MANY, 0), engine.submit([2], MANY, 0)
        say(group, handle, 5)
        monkeypatch.setattr(group, "abort", lambda dp_rank, request_ids: None)  # it is lost
        handle.abort()
        output = handle.result(30)
        assert (output.finish_reason, output.token_ids) == (FinishReason.ABORT, (5,))
        lose(group, 0)
        assert [*group.taken] == [other.request_id], "nobody goes on with it"
        group.on_progress(0, [RequestUpdate(handle.request_id, 1, (6,))])
        assert [token for delta in handle for token in delta.token_ids] == [5]
        assert outstanding(engine) == [(1, 21), (0, 0)]
