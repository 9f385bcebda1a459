"""Calls of the openai client, sync and async, whole and streamed, checked by OpenAI's types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion

from tests.dp_runtime.server.served import MODEL, WAIT_S, Served

KEY = "none"
Content = dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """An endpoint of a server as the clients call it: each way gives JSON as it came."""

    served: Served

    @property
    def _how(self) -> Content:
        url = f"{self.served.url}/v1"
        return {"base_url": url, "api_key": KEY, "max_retries": 0, "timeout": WAIT_S}

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(**self._how)

    def completion(self, **request: Any) -> Content:
        answer: Any = self.client.completions.create(**self._request(request))
        return checked_completion(answer)

    def completion_stream(self, **request: Any) -> list[Content]:
        create: Any = self.client.completions.create
        with create(**self._request(request), stream=True) as stream:
            return [checked_completion(chunk) for chunk in stream]

    def async_completions(self, requests: Sequence[Content]) -> list[Content]:
        """The answers to requests that run at the same time, every second one streamed."""
        return asyncio.run(self._at_once(requests))

    async def _at_once(self, requests: Sequence[Content]) -> list[Content]:
        async with AsyncOpenAI(**self._how) as client:
            calls = [
                self._async_stream(client, request) if number % 2 else self._async(client, request)
                for number, request in enumerate(requests)
            ]
            return await asyncio.gather(*calls)

    async def _async(self, client: AsyncOpenAI, request: Content) -> Content:
        answer: Any = await client.completions.create(**self._request(request))
        return checked_completion(answer)

    async def _async_stream(self, client: AsyncOpenAI, request: Content) -> Content:
        create: Any = client.completions.create
        options = {"stream": True, "stream_options": {"include_usage": True}}
        stream = await create(**self._request(request), **options)
        return joined([checked_completion(chunk) async for chunk in stream])

    def _request(self, fields: Content) -> Content:
        """Put what OpenAI does not know into extra_body, where users of the client put it."""
        return as_call({"model": MODEL} | fields, _COMPLETION_FIELDS)


_COMPLETION_FIELDS = frozenset(
    {
        "model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs",
        "max_tokens", "n", "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix",
        "temperature", "top_p", "user",
    }
)  # fmt: skip


def as_call(fields: Content, known: frozenset[str]) -> Content:
    own = {name: value for name, value in fields.items() if name in known}
    return own | {"extra_body": {n: value for n, value in fields.items() if n not in known}}


def checked_completion(answer: Completion) -> Content:
    """The JSON of an answer or a chunk, which must have the shape of OpenAI's reference."""
    content: Content = json.loads(answer.to_json())
    shown = json.loads(answer.to_json())
    for choice in shown["choices"]:
        if choice["finish_reason"] is None:
            choice["finish_reason"] = "stop"  # null until a stream ends, which the type omits
        for column in ("token_logprobs", "top_logprobs"):
            entries = (choice["logprobs"] or {}).get(column)
            if entries and entries[0] is None:
                del entries[0]  # of a prompt's first token, which the type omits too
    Completion.model_validate_json(json.dumps(shown), strict=True)
    return content


@dataclass
class JoinedChoice:
    index: int
    content: Content = field(default_factory=dict)

    def add(self, piece: Content) -> None:
        content = self.content
        assert content.get("finish_reason") is None, "nothing comes after the reason of the end"
        for name, value in piece.items():
            match content.get(name), value:
                case ((dict() as columns), dict()):
                    for column, entries in value.items():
                        columns[column] += entries
                case (str(), str()) | (list(), list()):
                    content[name] += value
                case _:
                    content[name] = value


def joined(chunks: Sequence[Content]) -> Content:
    """The whole answer that the chunks of a stream make up."""
    choices: dict[int, JoinedChoice] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            index = piece["index"]
            choices.setdefault(index, JoinedChoice(index)).add(piece)
    return chunks[0] | {
        "choices": [choices[index].content for index in sorted(choices)],
        "usage": chunks[-1].get("usage"),
    }


def check_alike(one: Any, other: Any, path: str = "") -> None:
    """Assert that two answers to a request differ in nothing but their ids and rounding."""
    match one, other:
        case dict(), dict():
            assert one.keys() == other.keys(), path
            for name in one.keys() - {"id", "created"}:
                check_alike(one[name], other[name], f"{path}.{name}")
        case list(), list():
            assert len(one) == len(other), path
            for index, (mine, yours) in enumerate(zip(one, other)):
                check_alike(mine, yours, f"{path}[{index}]")
        case float(), float():
            assert one == pytest.approx(other, abs=1e-4), path
        case _:
            assert one == other, path
