"""AsyncEngine: the same answers as Engine, to tasks that wait, are cancelled, or read slowly."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Coroutine, Iterator
from typing import Any
from unittest.mock import patch

import pytest

from dp_runtime import AsyncEngine, Engine, EngineConfig, FinishReason, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.rank_events.kv_events import BlockStored
from dp_runtime.core.request import Prompt, RequestUpdate
from dp_runtime.engine.async_handle import AsyncRequestHandle
from dp_runtime.errors import EngineClosed, EngineOverloaded, RankFailed
from tests.dp_runtime.engine.fake_group import FakeGroup
from tests.serving import check_pages_free

PROMPTS: list[Prompt] = [
    "The list of arguments",
    "Return a new string",
    [5, 6, 7],
    "A class",
    "The default",
]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 60))


@pytest.fixture(scope="module")
def served() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(EngineConfig(str(TINY_MODEL), dp_size=2, launcher="thread"))
    yield engine
    engine.close_now()


def test_results_and_joined_deltas_are_those_of_the_engine(served: AsyncEngine) -> None:
    with Engine(served.config) as engine:
        expected = [output.text for output in engine.generate(PROMPTS, GREEDY)]

    async def joined(index: int) -> str:
        return "".join([delta.text async for delta in served.stream(PROMPTS[index], GREEDY)])

    async def both() -> tuple[list[str], list[str]]:
        outputs = await served.generate(PROMPTS, GREEDY)
        texts = await asyncio.gather(*map(joined, range(len(PROMPTS))))
        return [output.text for output in outputs], list(texts)

    assert run(both()) == (expected, expected)
    assert run(both()) == (expected, expected)  # in another event loop


def test_hundreds_of_streams_need_no_thread_each(served: AsyncEngine) -> None:
    params = SamplingParams(max_tokens=4, ignore_eos=True)

    async def count(number: int) -> int:
        return sum([len(d.token_ids) async for d in served.stream([1 + number % 50], params)])

    async def all_at_once() -> tuple[list[int], int]:
        tasks = [asyncio.create_task(count(number)) for number in range(300)]
        await asyncio.sleep(0)
        num_threads = threading.active_count()
        return await asyncio.gather(*tasks), num_threads

    before = threading.active_count()
    counts, during = run(all_at_once())
    assert counts == [4] * 300
    assert during <= before + 1


ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)


async def leave_early(engine: AsyncEngine, how: str) -> None:
    match how:
        case "break":
            async for _ in engine.stream("a", ENDLESS):
                break
        case "never begun":
            engine.stream("a", ENDLESS)
        case "cancelled stream" | "cancelled result" | "cancelled generate":

            async def read() -> None:
                if how == "cancelled generate":
                    await engine.generate(["a", "b"], ENDLESS)
                elif how == "cancelled result":
                    await engine.submit("a", ENDLESS).result()
                else:
                    async for _ in engine.stream("a", ENDLESS):
                        pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task


LEAVING = ("break", "never begun", "cancelled stream", "cancelled result", "cancelled generate")


@pytest.mark.parametrize("how", LEAVING)
def test_leaving_aborts(served: AsyncEngine, how: str) -> None:
    async def leave_and_wait() -> None:
        await leave_early(served, how)
        gc.collect()
        while served.num_unfinished:
            await asyncio.sleep(0.005)

    run(leave_and_wait())
    check_pages_free(served)


def test_a_loop_that_ended_leaves_nothing_running(served: AsyncEngine) -> None:
    kept = []

    async def start() -> None:
        kept.append(served.submit("a", ENDLESS))

    run(start())

    async def wait_until_idle() -> None:
        while served.num_unfinished:
            await asyncio.sleep(0.005)

    run(wait_until_idle())


def test_all_of_several_requests_are_taken_or_none() -> None:
    async def submit(engine: AsyncEngine, group: FakeGroup) -> None:
        requests = [engine.checked([1]) for _ in range(3)]
        with pytest.raises(EngineOverloaded):
            engine.submit_all(requests)
        assert not group.taken
        assert len(engine.submit_all(requests[:2])) == 2

    with_fake(submit, max_queued_requests=2)


def test_generate_waits_for_a_place() -> None:
    async def fill(engine: AsyncEngine, group: FakeGroup) -> None:
        task = asyncio.create_task(engine.generate([[1], [2], [3]]))
        while len(group.taken) < 2:
            await asyncio.sleep(0)
        for request_id in range(3):
            while request_id not in group.taken:
                await asyncio.sleep(0.001)
            group.end(request_id, token_ids=(4,), finish_reason=FinishReason.LENGTH)
        assert [output.token_ids for output in await task] == [(4,)] * 3

    with_fake(fill, max_queued_requests=2)


def test_tasks_wait_for_places_in_the_order_of_all_callers() -> None:
    """Without a look at the clock: who leaves hands the place over."""

    async def wait(engine: AsyncEngine, group: FakeGroup) -> None:
        first = engine.submit([1])
        params = [SamplingParams(priority=number) for number in (1, 0, 1, -1)]
        tasks = []
        for number, one in enumerate(params):
            tasks.append(asyncio.create_task(engine.generate([[10 + number]], one)))
            await asyncio.sleep(0)
        tasks.append(asyncio.create_task(engine.generate([[20]])))
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        ended = [first.request_id]
        for prompt in (13, 11, 20, 10):
            group.end(ended[-1], token_ids=(4,), finish_reason=FinishReason.LENGTH)
            while not group.taken:
                await asyncio.sleep(0)
            ((request_id, (_, request)),) = group.taken.items()
            assert request.prompt_token_ids == (prompt,)
            with pytest.raises(EngineOverloaded) as caught:
                engine.submit([1])
            assert caught.value.num_waiting == 4 - len(ended)
            ended.append(request_id)
        group.end(ended[-1], token_ids=(4,), finish_reason=FinishReason.LENGTH)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(each, asyncio.CancelledError) for each in outcomes] == [
            False, False, True, False, False,
        ]  # fmt: skip
        assert engine.num_unfinished == 0

    with_fake(wait, max_queued_requests=1)


@pytest.mark.parametrize("granted", [False, True])
def test_a_task_that_is_cancelled_gives_its_place_back(granted: bool) -> None:
    async def cancel(engine: AsyncEngine, group: FakeGroup) -> None:
        first = engine.submit([1])
        task = asyncio.create_task(engine.generate([[2]]))
        await asyncio.sleep(0)
        if granted:  # and cancelled before it has heard of it
            group.end(first.request_id, finish_reason=FinishReason.LENGTH)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        if not granted:
            group.end(first.request_id, finish_reason=FinishReason.LENGTH)
        assert engine.num_unfinished == 0
        assert not group.taken

    with_fake(cancel, max_queued_requests=1)


def test_one_poll_wakes_the_loop_once() -> None:
    async def poll(engine: AsyncEngine, group: FakeGroup) -> None:
        handles = [engine.submit([1], dp_rank=0) for _ in range(50)]
        loop = asyncio.get_running_loop()
        with patch.object(loop, "call_soon_threadsafe", wraps=loop.call_soon_threadsafe) as wake:
            group.on_progress(0, [RequestUpdate(each.request_id, 0, (9,)) for each in handles])
        assert wake.call_count == 1
        deltas = [await handle.next_delta() for handle in handles]
        assert [delta.token_ids for delta in deltas if delta] == [(9,)] * 50

    with_fake(poll)


def test_kv_events_wait_for_the_next_call_where_one_is_cancelled() -> None:
    async def cancel(engine: AsyncEngine, group: FakeGroup) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.kv_events(timeout_s=30), 0.05)
        group.on_kv_events(0, [BlockStored((b"1",), None, (1, 2), 2)])
        await asyncio.sleep(0.05)  # for the thread of the first call, which waits on
        (batch,) = await engine.kv_events(timeout_s=30)
        assert batch.data_parallel_rank == 0

    with_fake(cancel, kv_events=True)


@pytest.mark.parametrize("cause", ["a lost rank", "close"])
def test_the_end_of_the_engine_reaches_all_who_wait(cause: str) -> None:
    kind = RankFailed if cause == "a lost rank" else EngineClosed

    async def end(engine: AsyncEngine, group: FakeGroup) -> None:
        handle = engine.submit([1])
        waiting = [
            asyncio.create_task(engine.submit([1]).result()),
            asyncio.create_task(read_all(handle)),
        ]
        await asyncio.sleep(0)
        if cause == "close":
            await engine.close()
        else:
            threading.Thread(target=group.on_failure, args=(RankFailed("rank 1"),)).start()
        outcomes = await asyncio.gather(*waiting, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [kind, kind]
        with pytest.raises(kind):
            engine.submit([1])

    with_fake(end)


async def read_all(handle: AsyncRequestHandle) -> None:
    while await handle.next_delta() is not None:
        pass


def with_fake(act: Any, **fields: Any) -> None:
    group = FakeGroup(fields.get("dp_size", 2))

    async def run_act() -> None:
        given: dict[str, Any] = {"dp_size": 2, "launcher": "thread"} | fields
        with patch("dp_runtime.engine.core.start_ranks", lambda *given: group):
            engine = AsyncEngine(EngineConfig("fake", **given))
        async with engine:
            await act(engine, group)

    run(run_act())
