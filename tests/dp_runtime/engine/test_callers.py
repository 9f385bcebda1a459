"""What callers do with outputs and streams concerns them alone: raise, leave, close loops."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import pytest

from dp_runtime import AsyncEngine, Engine, EngineConfig, RequestOutput, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from tests.dp_runtime.engine.fake_group import fake_engine, outstanding
from tests.serving import check_pages_free
from tests.workers.leftovers import wait_until

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)
CONFIG = EngineConfig(str(TINY_MODEL), dp_size=2, launcher="thread")


class Mine(Exception):
    """Raised by a caller's own code."""


def fail(*_: object) -> NoReturn:
    raise Mine


def out_of_callback(engine: Engine) -> None:
    def on_output(index: int, output: RequestOutput) -> None:
        if index == 1:
            fail()

    engine.generate([[1]] * 4, [SamplingParams(max_tokens=1)] * 2 + [ENDLESS] * 2, None, False,
                    on_output)  # fmt: skip


def out_of_loop(engine: Engine) -> None:
    for _ in engine.stream([1], ENDLESS):
        fail()


def out_of_prompts(engine: Engine) -> None:
    class Prompts(list[Any]):
        def __iter__(self) -> NoReturn:
            fail()

    engine.submit([1], ENDLESS).abort()
    engine.generate(Prompts([[1], [2]]), SamplingParams(max_tokens=1))
    fail()  # the entries of a list are read by no method of its own


def out_of_cycle(engine: Engine) -> None:
    """A stream that is garbage of a cycle, found whenever and wherever the collector runs."""
    held: list[Any] = [engine.stream([1], ENDLESS)]
    held.append(held)
    del held
    gc.collect()
    fail()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(CONFIG) as one:
        yield one


@pytest.mark.parametrize("leave", [out_of_callback, out_of_loop, out_of_prompts, out_of_cycle])
def test_who_raises_ends_what_was_begun_and_nothing_else(leave: Any, engine: Engine) -> None:
    (expected,) = engine.generate([[5, 6, 7]], GREEDY)
    good = engine.submit([5, 6, 7], GREEDY)
    with pytest.raises(Mine):
        leave(engine)
    assert good.result(60).token_ids == expected.token_ids
    wait_until(lambda: engine._core.num_unfinished == 0, "all that was begun has ended")
    check_pages_free(engine)


def test_tasks_that_raise_and_loops_that_are_closed_leave_nothing() -> None:
    async def raise_in_stream(engine: AsyncEngine) -> None:
        async for _ in engine.stream([1], ENDLESS):
            fail()

    async def some(engine: AsyncEngine) -> Any:
        good = engine.submit([5, 6, 7], GREEDY)
        outcomes = await asyncio.gather(
            *(raise_in_stream(engine) for _ in range(5)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [Mine] * 5
        return (await good.result()).token_ids

    engine = AsyncEngine(CONFIG)
    try:
        expected = asyncio.run(some(engine))
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(engine.generate([[1], [2]], ENDLESS)) for _ in range(3)]
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()  # with tasks that nobody will ever resume
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]
        del tasks, task
        gc.collect()
        assert asyncio.run(some(engine)) == expected
        wait_until(lambda: engine.num_unfinished == 0, "all that was begun has ended")
        check_pages_free(engine)
    finally:
        engine.close_now()


def test_the_collector_waits_for_no_lock() -> None:
    """It may run in a thread that holds what the holder of the other lock waits for."""
    with fake_engine() as (engine, group):
        held: list[Any] = [engine.stream([1], ENDLESS)]
        held.append(held)
        del held
        collector = threading.Thread(target=gc.collect)
        with engine._core._sending, engine._core._lock:
            collector.start()
            collector.join(30)
            assert not collector.is_alive()
        wait_until(lambda: outstanding(engine) == [(0, 0), (0, 0)], "it is aborted")
        assert not group.taken
