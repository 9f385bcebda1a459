"""A load of unlike requests, some of whose clients leave, and what each of the others must hear."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dp_runtime import AsyncEngine, SamplingParams
from examples.benchmarks.harness.http_load import Client, Response, events_of, whole_of

LEAVES_EVERY = 10
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Ask:
    prompts: list[list[int]]
    params: SamplingParams
    n: int
    stream: bool
    leaves: bool  # the client, once it has heard something, or after a while

    @property
    def body(self) -> dict[str, Any]:
        params = self.params
        body = {
            "prompt": self.prompts, "n": self.n, "max_tokens": params.max_tokens,
            "temperature": params.temperature, "seed": params.seed, "ignore_eos": True,
            "return_token_ids": True, "stream": self.stream,
        }  # fmt: skip
        return body | ({"stream_options": {"include_usage": True}} if self.stream else {})


@dataclass
class Choice:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True)
class Heard:
    choices: list[Choice]
    usage: tuple[int, int]  # prompt and completion tokens


def make_load(count: int, seed: int) -> list[Ask]:
    rng = np.random.default_rng(seed)
    asks = []
    for index in range(count):
        leaves = index % LEAVES_EVERY == LEAVES_EVERY - 1
        prompts = [
            rng.integers(1, 3000, rng.integers(1, 24)).tolist() for _ in range(1 + (index % 7 == 0))
        ]
        params = SamplingParams(
            max_tokens=1500 if leaves else int(rng.integers(1, 20)),
            temperature=0.0 if index % 3 else 0.8, seed=index, ignore_eos=True,
        )  # fmt: skip
        asks.append(Ask(prompts, params, 1 + 2 * (index % 5 == 0), index % 4 != 0, leaves))
    return asks


async def expected_of(engine: AsyncEngine, ask: Ask) -> Heard:
    """What the Python API says: the choices of a prompt have seeds that follow each other."""
    seed = ask.params.seed
    assert seed is not None, "every one has a seed"
    prompts = [prompt for prompt in ask.prompts for _ in range(ask.n)]
    params = [replace(ask.params, seed=seed + index % ask.n) for index in range(len(prompts))]
    outputs = await engine.generate(prompts, params)
    choices = [Choice(each.text, list(each.token_ids), each.finish_reason) for each in outputs]
    usage = sum(map(len, ask.prompts)), sum(len(each.token_ids) for each in choices)
    return Heard(choices, usage)


async def hear_all(url: str, asks: Sequence[Ask], at_most: int) -> list[Heard | None]:
    """Send the requests, so many at a time; None for a client that left."""
    client, places = Client(url), asyncio.Semaphore(at_most)

    async def hear(ask: Ask) -> Heard | None:
        async with places:
            if not ask.leaves:
                return heard(await client.ask(client.encoded(ask.body)), ask.stream)
            await leave(client, ask)
            return None

    async with asyncio.timeout(TIMEOUT_S):
        answers = await asyncio.gather(*map(hear, asks))
    client.close()
    return list(answers)


async def leave(client: Client, ask: Ask) -> None:
    connection = await client.connect()
    asking = asyncio.ensure_future(connection.ask(client.encoded(ask.body)))
    await asyncio.sleep(0.2)
    while ask.stream and connection.num_pieces < 2:
        await asyncio.sleep(0.02)
    assert not asking.done(), "it is too long to have ended"
    connection.close()
    (error,) = await asyncio.gather(asking, return_exceptions=True)
    assert isinstance(error, ConnectionError), error


def heard(response: Response, stream: bool) -> Heard:
    status, pieces = response.read()
    assert status == 200, pieces
    contents = [content for _, content in (events_of(pieces) if stream else [whole_of(pieces)])]
    parts = [part for content in contents for part in content["choices"]]
    choices = [Choice() for _ in {part["index"] for part in parts}]
    for part in parts:
        choice = choices[part["index"]]
        assert choice.finish_reason is None, f"a part comes after the last: {json.dumps(part)}"
        choice.text += part["text"]
        choice.token_ids += part["token_ids"]
        choice.finish_reason = part["finish_reason"]
    usage = contents[-1]["usage"]
    return Heard(choices, (usage["prompt_tokens"], usage["completion_tokens"]))
