"""Requests that wait on one rank go to another, with ranks that really run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from time import monotonic, sleep

import pytest

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.request import FinishReason

SHORT = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
LONG = replace(SHORT, max_tokens=120)


@pytest.fixture(scope="module")
def one_at_a_time() -> Iterator[Engine]:
    config = EngineConfig(
        str(TINY_MODEL), dp_size=2, launcher="thread", routing="round_robin", max_num_requests=1
    )
    with Engine(config) as engine:
        yield engine


def moved(engine: Engine) -> int:
    return sum(rank.requests.moved for rank in engine.metrics())


def test_short_requests_do_not_wait_behind_a_long_one(one_at_a_time: Engine) -> None:
    engine, before = one_at_a_time, moved(one_at_a_time)
    long = engine.submit([5, 6, 7], LONG, dp_rank=0)
    prompts = [[number, 3, 4] for number in range(10, 20)]
    outputs = [handle.result(60) for handle in [engine.submit(each, SHORT) for each in prompts]]
    assert not long.done
    assert {output.dp_rank for output in outputs} == {1}
    assert moved(engine) - before == 5
    alone = engine.generate(prompts, SHORT, dp_ranks=[1] * len(prompts))
    assert [output.token_ids for output in outputs] == [output.token_ids for output in alone]
    assert len(long.result(60).token_ids) == LONG.max_tokens


def test_a_moved_request_is_aborted_like_others(one_at_a_time: Engine) -> None:
    engine = one_at_a_time
    long = engine.submit([5, 6, 7], LONG, dp_rank=0)
    handles = [engine.submit([number, 3, 4], LONG) for number in range(10, 16)]
    for handle in reversed(handles):
        handle.abort()
    long.abort()
    for handle in (long, *handles):
        assert handle.result(30).finish_reason is FinishReason.ABORT
    until = monotonic() + 30
    while any(rank.health.num_queued + rank.health.num_running for rank in engine.metrics()):
        assert monotonic() < until
        sleep(0.02)


def test_pinned_requests_wait_where_they_are(one_at_a_time: Engine) -> None:
    engine, before = one_at_a_time, moved(one_at_a_time)
    outputs = engine.generate([[number] for number in range(6)], SHORT, dp_ranks=[0] * 6)
    assert {output.dp_rank for output in outputs} == {0}
    assert moved(engine) == before
