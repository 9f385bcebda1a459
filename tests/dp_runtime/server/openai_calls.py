"""Calls of the openai client, sync and async, whole and streamed, checked by OpenAI's types."""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from dp_runtime import RequestOutput
from tests.dp_runtime.server.served import MODEL, WAIT_S, Served

KEY = "none"
EOS = 0  # of the tiny model
USAGE = {"stream_options": {"include_usage": True}}
Content = dict[str, Any]


@dataclass(frozen=True)
class Calls(ABC):
    """An endpoint of a server as the clients call it: each way gives JSON as it came."""

    served: Served

    @property
    def _how(self) -> Content:
        url = f"{self.served.url}/v1"
        return {"base_url": url, "api_key": KEY, "max_retries": 0, "timeout": WAIT_S}

    @cached_property
    def client(self) -> OpenAI:
        return OpenAI(**self._how)

    @property
    @abstractmethod
    def known_fields(self) -> frozenset[str]:
        """Fields that OpenAI has; users of its client put all others into extra_body."""

    @abstractmethod
    def create(self, client: Any) -> Any:
        """The method of a client that calls the endpoint."""

    @abstractmethod
    def checked(self, answer: Any) -> Content:
        """The JSON of an answer or a chunk, which must have the shape of OpenAI's reference."""

    def whole(self, **request: Any) -> Content:
        return self.checked(self.create(self.client)(**self._request(request)))

    def chunks(self, **request: Any) -> list[Content]:
        with self.create(self.client)(**self._request(request), stream=True) as stream:
            return [self.checked(chunk) for chunk in stream]

    def in_every_way(self, request: Content) -> Content:
        return self.all_in_every_way({"it": request})["it"]

    def all_in_every_way(self, requests: Mapping[str, Content]) -> dict[str, Content]:
        """The answers to requests that run at the same time.

        Each must be the same whole and streamed, with the sync client and with the async one.
        """
        with ThreadPoolExecutor(2 * len(requests)) as pool:
            whole = [pool.submit(self.whole, **each) for each in requests.values()]
            streamed = [pool.submit(self.chunks, **each, **USAGE) for each in requests.values()]
            others = asyncio.run(self._at_once([*requests.values()]))
        answers = [call.result() for call in whole]
        others += [joined(call.result()) for call in streamed]
        for other, answer in zip(others, 3 * answers, strict=True):
            check_alike(other, answer)
        return dict(zip(requests, answers))

    async def _at_once(self, requests: Sequence[Content]) -> list[Content]:
        async with AsyncOpenAI(**self._how) as client:
            create = self.create(client)

            async def streamed(request: Content) -> Content:
                stream = await create(**self._request(request), **USAGE, stream=True)
                return joined([self.checked(chunk) async for chunk in stream])

            async def whole(request: Content) -> Content:
                return self.checked(await create(**self._request(request)))

            return await asyncio.gather(*map(whole, requests), *map(streamed, requests))

    def _request(self, fields: Content) -> Content:
        fields = {"model": MODEL} | fields
        own = {name: value for name, value in fields.items() if name in self.known_fields}
        extra = {name: value for name, value in fields.items() if name not in own}
        return own | {"extra_body": extra}


_BOTH = frozenset(
    {
        "model", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
        "presence_penalty", "seed", "stop", "stream", "stream_options", "temperature", "top_p",
        "user",
    }
)  # fmt: skip


class Completions(Calls):
    known_fields = _BOTH | {"prompt", "best_of", "echo", "suffix"}

    def create(self, client: Any) -> Any:
        return client.completions.create

    def checked(self, answer: Any) -> Content:
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


class ChatCompletions(Calls):
    known_fields = _BOTH | {
        "messages", "max_completion_tokens", "top_logprobs", "tools", "tool_choice",
        "parallel_tool_calls", "response_format", "reasoning_effort", "metadata", "service_tier",
    }  # fmt: skip

    def create(self, client: Any) -> Any:
        return client.chat.completions.create

    def checked(self, answer: Any) -> Content:
        kind = ChatCompletionChunk if isinstance(answer, ChatCompletionChunk) else ChatCompletion
        kind.model_validate_json(answer.to_json(), strict=True)
        content: Content = json.loads(answer.to_json())
        return content


def told_stop_reason(output: RequestOutput) -> str | int | None:
    """Over HTTP, end-of-text is no stop token."""
    return None if output.stop_reason == EOS else output.stop_reason


def joined(chunks: Sequence[Content]) -> Content:
    """The whole answer that the chunks of a stream make up."""
    whole = {**chunks[0], "object": chunks[0]["object"].removesuffix(".chunk")}
    choices: dict[int, Content] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            choice = choices.setdefault(piece["index"], {})
            assert choice.get("finish_reason") is None, "nothing comes after the reason of the end"
            choices[piece["index"]] = _merged(choice, _as_message(piece))
    return whole | {
        "choices": [_whole_message(choices[index]) for index in sorted(choices)],
        "usage": chunks[-1].get("usage"),
    }


def _as_message(piece: Content) -> Content:
    """A delta as a part of a message, whose tool calls are found by their index."""
    if "delta" not in piece:
        return piece
    message = {"refusal": None} | piece["delta"]
    if "tool_calls" in message:
        message["tool_calls"] = {call.pop("index"): call for call in message["tool_calls"]}
    return {name: value for name, value in piece.items() if name != "delta"} | {"message": message}


def _whole_message(choice: Content) -> Content:
    message = choice.get("message", {})
    if "tool_calls" not in message:
        return choice
    calls = message["tool_calls"]
    content = message["content"] or None
    own = message | {"content": content, "tool_calls": [calls[index] for index in sorted(calls)]}
    return choice | {"message": own}


def _merged(one: Any, other: Any) -> Any:
    match one, other:
        case dict(), dict():
            return one | {name: _merged(one.get(name), value) for name, value in other.items()}
        case (str(), str()) | (list(), list()):
            return one + other
        case _, None:
            return one
    return other


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
