"""Many clients at a time: nothing is lost, all is as the Python API says, and nothing is left."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import monotonic, sleep

import httpx
import psutil
import pytest

from dp_runtime import AsyncEngine, EngineConfig
from dp_runtime.cli.model_choice import TINY_MODEL
from tests.dp_runtime.server.launched import launched
from tests.dp_runtime.server.mixed_load import Ask, Heard, expected_of, hear_all, make_load
from tests.dp_runtime.server.served import WAIT_S, serving
from tests.dp_runtime.server.unharmed import held, soon

ROUNDS, ROUND_SIZE = 4, 512
ALLOWED_GROWTH = 8 * 2**20
HELD_METRICS = (
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
)  # fmt: skip


async def expected_of_all(engine: AsyncEngine, asks: Sequence[Ask]) -> list[Heard | None]:
    async def one(ask: Ask) -> Heard | None:
        return None if ask.leaves else await expected_of(engine, ask)

    return list(await asyncio.gather(*map(one, asks)))


def test_what_64_clients_hear_is_what_the_engine_says_and_nothing_is_left() -> None:
    with serving() as served:
        asks = make_load(80, seed=1)
        expected = asyncio.run(expected_of_all(served.engine, asks))
        asyncio.run(hear_all(served.url, asks[:32], 32))
        served.check_idle()
        before = held(served)
        assert asyncio.run(hear_all(served.url, asks, 64)) == expected
        served.check_idle()
        soon(lambda: all(now <= then for now, then in zip(held(served), before)), served, before)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_2048_requests_512_at_a_time_leave_the_memory_flat() -> None:
    asks = make_load(ROUND_SIZE, seed=2)
    config = EngineConfig(str(TINY_MODEL), dp_size=4, launcher="local", device="cpu")
    engine = AsyncEngine(config)
    expected = asyncio.run(expected_of_all(engine, asks))
    engine.close_now()
    uses = []
    with launched("--launcher", "local", "--dp-size", "4", "--device", "cpu") as server:
        server.wait_for("ready:")
        for _ in range(ROUNDS):
            assert asyncio.run(hear_all(server.url, asks, ROUND_SIZE)) == expected
            wait_until_nothing_is_held(server.url)
            uses.append(use_of(server.process.pid))
    print("resident bytes, threads, files after each round:", uses)
    (memory, *handles), (memory_then, *handles_then) = uses[1], uses[-1]  # one round warms up
    assert memory_then <= memory + ALLOWED_GROWTH, uses
    assert handles_then <= handles, uses


def wait_until_nothing_is_held(url: str) -> None:
    deadline = monotonic() + WAIT_S
    with httpx.Client(base_url=url, timeout=WAIT_S) as client:
        while held := [line for line in client.get("/metrics").text.splitlines() if holds(line)]:
            assert monotonic() < deadline, held
            sleep(0.05)
        assert client.post("/v1/abort", json={"abort_all": True}).json() == {"aborted": []}


def holds(line: str) -> bool:
    return line.startswith(HELD_METRICS) and float(line.split()[-1]) != 0


def use_of(pid: int) -> tuple[int, int, int]:
    process = psutil.Process(pid)
    return process.memory_info().rss, process.num_threads(), process.num_fds()
