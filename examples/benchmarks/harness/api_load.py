"""Ways to ask an engine of this process for a load, and what any way costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic, process_time

import psutil

from dp_runtime import AsyncEngine, Engine, SamplingParams
from examples.benchmarks.harness.http_load import Outcome
from examples.benchmarks.harness.load import (
    Answer,
    LoadRequest,
    check_answers,
    figures_of,
    run_load,
)

Load = list[LoadRequest]
Way = Callable[[Load], Outcome]


def params_of(request: LoadRequest) -> SamplingParams:
    return SamplingParams(max_tokens=request.output_len, temperature=0.0, ignore_eos=True)


def ask_sync(engine: Engine, request: LoadRequest, stream: bool) -> Answer:
    answer = Answer(monotonic())
    handle = engine.submit(request.prompt, params_of(request))
    for part in handle if stream else [handle.result()]:
        answer.came(part.token_ids)
    return answer


async def ask_async(engine: AsyncEngine, request: LoadRequest, stream: bool) -> Answer:
    answer = Answer(monotonic())
    if stream:
        async for delta in engine.stream(request.prompt, params_of(request)):
            answer.came(delta.token_ids)
    else:
        (output,) = await engine.generate([request.prompt], params_of(request))
        answer.came(output.token_ids)
    return answer


def through_api(engine: AsyncEngine, stream: bool, at_most: int, timeout_s: float) -> Way:
    async def run(load: Load) -> Outcome:
        async with asyncio.timeout(timeout_s):
            ask = partial(ask_async, engine, stream=stream)
            return Outcome(await run_load(load, ask, at_most))

    return lambda load: asyncio.run(run(load))


def measure(way: Way, load: Load, rank_pids: Sequence[int]) -> dict[str, float]:
    """Figures of a load served once; CPU times in us a token, of this process first."""
    ranks = [psutil.Process(pid) for pid in rank_pids]
    ranks_before, driver_before = sum(map(cpu_s, ranks)), process_time()
    outcome = way(load)
    driver_s, ranks_s = process_time() - driver_before, sum(map(cpu_s, ranks)) - ranks_before
    check_answers(load, outcome.answers)
    tokens = sum(request.output_len for request in load)
    spent = {"driver": driver_s, "client": outcome.cpu_s, "ranks": ranks_s}
    return figures_of(outcome.answers) | {
        f"{who}_us": round(seconds / tokens * 1e6, 1) for who, seconds in spent.items()
    }


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
