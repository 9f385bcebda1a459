"""Any call of the API, from any thread, in any order, is served or refused; others see nothing."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from dp_runtime import AsyncEngine, Engine, EngineConfig, SamplingParams
from dp_runtime.cli.jsonl import read_prompts
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.errors import EngineClosed
from tests.api_calls import ALLOWED, WAIT_S, Draw, call, call_async, line_of
from tests.serving import bystander, check_pages_free
from tests.workers.leftovers import left_overs, nothing_new, wait_until

GOOD = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
DEFAULTS = SamplingParams(max_tokens=2)
CONFIG = EngineConfig(
    str(TINY_MODEL), dp_size=2, launcher="thread", max_model_len=64, max_queued_requests=4
)
NUM_THREADS = 4


class Outcomes:
    """Counts what calls came to; what is no documented error is kept."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.unexpected: list[str] = []

    def of(self, work: Callable[[], object]) -> None:
        try:
            work()
        except ALLOWED as error:
            self.refused(error)
        except BaseException:
            self.unexpected.append(traceback.format_exc())
        else:
            self.counts["served"] += 1

    def refused(self, error: BaseException) -> None:
        self.counts[type(error).__name__] += 1
        text = str(error)
        if not text.isprintable() or len(text) > 2000:
            self.unexpected.append(f"the text of {type(error).__name__}: {text[:3000]!r}")


def in_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(NUM_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(3000)
        assert not thread.is_alive(), "a call hangs"


def check_nothing_left(engine: Engine | AsyncEngine) -> None:
    gc.collect()
    wait_until(lambda: engine._core.num_unfinished == 0, "nothing is unfinished", WAIT_S)
    check_pages_free(engine)
    wait_until(lambda: engine._core._deadlines._due == {}, "no deadline is left", WAIT_S)
    assert engine._core._outputs._live == {}
    assert all(rank.epoch == 0 for rank in engine._core.health(5.0))


def fuzz_calls(count: int, seed: int) -> Counter[str]:
    outcomes = Outcomes()
    with Engine(CONFIG) as engine:

        def make_calls(number: int) -> None:
            draw, kept = Draw(seed * NUM_THREADS + number, 0.3), list[Any]()
            for _ in range(count // NUM_THREADS):
                outcomes.of(lambda: call(engine, draw, kept))

        with bystander(lambda: engine.generate([[5, 6, 7]], GOOD)[0].token_ids):
            in_threads(make_calls)
        check_nothing_left(engine)
        kept = [engine.submit([1], GOOD)]
    draw = Draw(seed, 0.3)
    for _ in range(20):  # after close
        outcomes.of(lambda: call(engine, draw, kept))
    with pytest.raises(EngineClosed):
        engine.submit([1])
    assert outcomes.unexpected == []
    return outcomes.counts


def fuzz_tasks(count: int, seed: int) -> Counter[str]:
    outcomes = Outcomes()
    engine = AsyncEngine(CONFIG)

    async def make_calls(number: int) -> None:
        draw, kept = Draw(seed * 100 + number, 0.3), list[Any]()
        for _ in range(count // 20):
            task = asyncio.ensure_future(call_async(engine, draw, kept))
            if draw.random.random() < 0.1:
                await asyncio.sleep(draw.random.random() / 100)
                task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if not isinstance(outcome, asyncio.CancelledError):
                outcomes.of(partial(_raise, outcome))

    async def all_tasks() -> None:
        await asyncio.wait_for(asyncio.gather(*map(make_calls, range(20))), 3000)

    def serve() -> tuple[int, ...]:
        return asyncio.run(engine.generate([[5, 6, 7]], GOOD))[0].token_ids

    try:
        with bystander(serve):
            asyncio.run(all_tasks())
        check_nothing_left(engine)
    finally:
        engine.close_now()
    outcomes.of(lambda: engine.submit([1]))
    assert outcomes.unexpected == []
    return outcomes.counts


def _raise(outcome: object) -> None:
    if isinstance(outcome, BaseException):
        raise outcome


def fuzz_lines(count: int, seed: int, path: Path) -> Counter[str]:
    outcomes, draw = Outcomes(), random.Random(seed)
    with Engine(CONFIG) as engine:

        def serve_file() -> None:
            lines = read_prompts(path, DEFAULTS)
            engine.generate(
                [one.prompt for one in lines],
                [one.params for one in lines],
                [one.dp_rank for one in lines],
            )

        with bystander(lambda: engine.generate([[5, 6, 7]], GOOD)[0].token_ids):
            for _ in range(count):
                path.write_bytes(line_of(draw) + draw.choice((b"", b"\n", b"\r\n\r\n")))
                outcomes.of(serve_file)
        check_nothing_left(engine)
    assert outcomes.unexpected == []
    return outcomes.counts


@pytest.mark.parametrize(
    ("calls", "tasks", "lines"),
    [(200, 100, 100), pytest.param(5000, 2500, 2500, marks=pytest.mark.slow)],
)
def test_any_call_is_served_or_refused(calls: int, tasks: int, lines: int, tmp_path: Path) -> None:
    before = left_overs()
    num_fds = psutil.Process().num_fds()
    counts = [
        fuzz_calls(calls, 1), fuzz_tasks(tasks, 2), fuzz_lines(lines, 3, tmp_path / "lines.jsonl")
    ]  # fmt: skip
    print(*counts, sep="\n")
    assert all(count["served"] and count["ValueError"] for count in counts)
    assert nothing_new(before)
    assert psutil.Process().num_fds() <= num_fds + 8  # those of pools that stay
