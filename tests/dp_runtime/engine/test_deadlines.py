"""Deadlines: a request ends in time, with what it has, wherever it is."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from time import monotonic

import pytest

from dp_runtime import AsyncEngine, Engine, EngineConfig, RequestHandle, SamplingParams
from dp_runtime.cli.jsonl import read_prompts
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.membership import Transition
from dp_runtime.core.request import FinishReason, RequestUpdate
from dp_runtime.engine.deadlines import Deadlines
from dp_runtime.errors import RankFailed
from tests.dp_runtime.engine.fake_group import FakeGroup, fake_engine, outstanding
from tests.dp_runtime.engine.test_async_engine import with_fake
from tests.serving import check_pages_free

SOON = SamplingParams(timeout_s=0.05)
WAIT_S = 30.0


def test_the_earliest_is_told_of_first_and_none_that_was_removed() -> None:
    late: Queue[Sequence[int]] = Queue()
    deadlines = Deadlines(lambda due: late.put(list(due)))
    now = monotonic()
    for request_id, after_s in ((1, 0.2), (2, 0.02), (3, 0.1), (4, 0.01), (5, 3600)):
        deadlines.add(request_id, now + after_s, FinishReason.TIMEOUT)
    deadlines.remove(4)
    assert [late.get(timeout=WAIT_S) for _ in range(3)] == [[2], [3], [1]]
    thread = deadlines._thread
    deadlines.close()
    thread.join(WAIT_S)
    assert not thread.is_alive()
    assert late.empty()


def test_the_first_of_two_ends_of_a_request_counts() -> None:
    told: Queue[object] = Queue()
    deadlines = Deadlines(told.put)
    now = monotonic()
    for request_id in (1, 2):
        deadlines.add(request_id, now + 3600, FinishReason.TIMEOUT)
    deadlines.add(1, now, FinishReason.ABORT)
    deadlines.add(2, now + 7200, FinishReason.ABORT)
    assert told.get(timeout=WAIT_S) == {1: FinishReason.ABORT}
    deadlines.add(2, 0.0, FinishReason.ABORT)
    assert told.get(timeout=WAIT_S) == {2: FinishReason.ABORT}
    deadlines.close()


def test_a_late_request_ends_with_what_was_delivered() -> None:
    """Its rank says nothing, as one that hangs or is being replaced; then it speaks again."""
    with fake_engine() as (engine, group):
        handle, other = engine.submit([1], SOON), engine.submit([2])
        rank = handle.dp_rank
        group.on_progress(rank, [RequestUpdate(handle.request_id, 0, (4, 5))])
        output = handle.result(WAIT_S)
        assert (output.finish_reason, output.token_ids) == (FinishReason.TIMEOUT, (4, 5))
        group.on_progress(rank, [RequestUpdate(handle.request_id, 2, (6,))])
        deltas = list(handle)
        assert [token for delta in deltas for token in delta.token_ids] == [4, 5]
        assert deltas[-1].finish_reason is FinishReason.TIMEOUT
        assert list(group.taken) == [other.request_id]
        resumed: list[object] = []
        group.on_transition(Transition(group.members, frozenset({0, 1})), resumed.append)
        (again,) = resumed
        assert isinstance(again, dict)
        assert [one.request_id for some in again.values() for one in some] == [other.request_id]
        group.end(other.request_id, finish_reason=FinishReason.LENGTH)
        assert outstanding(engine) == [(0, 0), (0, 0)]
        assert engine._core._metrics.of(rank).ended == {FinishReason.TIMEOUT: 1} | (
            {FinishReason.LENGTH: 1} if other.dp_rank == rank else {}
        )


def test_a_deadline_that_passes_as_its_rank_is_lost() -> None:
    with fake_engine(routing="round_robin") as (engine, group):
        handle = engine.submit([1], SOON)
        lost, told = handle.dp_rank, threading.Event()

        def resume(again: object) -> None:
            while handle.request_id in engine._core._outputs._live:
                told.wait(0.001)

        group.on_transition(Transition(group.members, frozenset({lost})), resume)
        assert handle.result(WAIT_S).finish_reason is FinishReason.TIMEOUT
        assert outstanding(engine) == [(0, 0), (0, 0)]
        assert not group.taken  # whoever had it last was told


def test_callers_who_wait_for_a_place_are_late_too() -> None:
    with fake_engine(max_queued_requests=1) as (engine, group):
        first = engine.submit([1])
        outputs = engine.generate([[2], [3]], SOON)
        assert [output.finish_reason for output in outputs] == [FinishReason.TIMEOUT] * 2
        assert [output.token_ids for output in outputs] == [(), ()]
        assert list(group.taken) == [first.request_id]
        first.abort()
        assert outstanding(engine) == [(0, 0), (0, 0)]


def test_tasks_that_wait_for_a_place_are_late_too() -> None:
    async def wait(engine: AsyncEngine, group: FakeGroup) -> None:
        first = engine.submit([1])
        outputs = await engine.generate([[2], [3]], SOON)
        assert [output.finish_reason for output in outputs] == [FinishReason.TIMEOUT] * 2
        first.abort()
        await first.result()
        assert engine.num_unfinished == 0

    with_fake(wait, max_queued_requests=1)


def test_each_request_ends_once_and_loses_nothing() -> None:
    """Updates and deadlines come at the same time."""
    with fake_engine(dp_size=2, routing="round_robin") as (engine, group):
        params = [
            SamplingParams(timeout_s=0.002 * (1 + n % 20), max_tokens=1000) for n in range(80)
        ]
        handles = [engine.submit([1], one) for one in params]
        stop = threading.Event()

        def poll(rank: int) -> None:
            own = [handle for handle in handles if handle.dp_rank == rank]
            index = 0
            while not stop.is_set():
                updates = [RequestUpdate(each.request_id, index, (index % 90,)) for each in own]
                group.on_progress(rank, updates)
                index += 1

        pollers = [threading.Thread(target=poll, args=(rank,)) for rank in range(2)]
        for poller in pollers:
            poller.start()
        try:
            for handle in handles:
                check_end(handle)
        finally:
            stop.set()
            for poller in pollers:
                poller.join(WAIT_S)
        assert outstanding(engine) == [(0, 0), (0, 0)]


def check_end(handle: RequestHandle) -> None:
    output, deltas = handle.result(WAIT_S), list(handle)
    assert output.finish_reason is FinishReason.TIMEOUT
    assert [token for delta in deltas for token in delta.token_ids] == list(output.token_ids)
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason is FinishReason.TIMEOUT


def test_deadlines_end_with_their_engine() -> None:
    with fake_engine() as (engine, group):
        handle = engine.submit([1], SamplingParams(timeout_s=3600))
        thread = engine._core._deadlines._thread
        group.on_failure(RankFailed("rank 1 died"))
        thread.join(WAIT_S)
        assert not thread.is_alive()
        with pytest.raises(RankFailed):
            handle.result(0)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "1", True, 2**40])
def test_a_deadline_is_a_number_of_seconds(value: object) -> None:
    with pytest.raises(ValueError, match="timeout_s: "):
        SamplingParams(timeout_s=value)  # type: ignore[arg-type]


def test_a_line_of_a_prompt_file_may_have_one(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "timeout_s": 2}\n{"prompt": "b"}')
    assert [line.params.timeout_s for line in read_prompts(path, SamplingParams())] == [2.0, None]


def test_ranks_free_the_pages_of_late_requests() -> None:
    """Those that run, prefill, and wait in a rank's queue; others are served as ever."""
    config = EngineConfig(str(TINY_MODEL), dp_size=2, launcher="thread", max_num_requests=2)
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    endless = SamplingParams(max_tokens=1500, ignore_eos=True, timeout_s=0.2)
    with Engine(config) as engine:
        (expected,) = engine.generate([[5, 6, 7]], greedy)
        late = [engine.submit([1 + n] * (1 + 40 * n), endless) for n in range(12)]
        good = engine.submit([5, 6, 7], greedy)
        outputs = [handle.result(WAIT_S) for handle in late]
        assert {output.finish_reason for output in outputs} == {FinishReason.TIMEOUT}
        assert good.result(WAIT_S).token_ids == expected.token_ids
        check_pages_free(engine)
        assert outstanding(engine) == [(0, 0), (0, 0)]
