"""Refusals and faults, as the openai client raises them and other clients parse them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import Any

import openai
import pytest

from dp_runtime.errors import RequestFailed
from tests.dp_runtime.server.openai_calls import KEY, Completions, Content
from tests.dp_runtime.server.served import Served, serving

MAX_MODEL_LEN = 64
ENDLESS: Content = {"prompt": "a", "max_tokens": 60, "ignore_eos": True}
# How clients read what they should ask for instead: limit, prompt, and what was asked for.
CONTEXT = re.compile(
    r"maximum context length is (\d+) tokens.*?request has (\d+) input tokens"
    r"(?:.*?\((\d+) > \d+ - \d+\))?"
)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    limits = {"api_key": KEY, "max_in_flight": 2, "max_body_bytes": 50_000}
    with serving(limits, dp_size=1, max_model_len=MAX_MODEL_LEN) as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def calls(served: Served) -> Completions:
    return Completions(served)


BAD: dict[str, tuple[Content, str, str | None]] = {
    "temperature": ({"temperature": -0.1}, "temperature", None),
    "type": ({"max_tokens": "many"}, "max_tokens", None),
    "number in a list": ({"stop_token_ids": [1, "x"]}, "stop_token_ids[1]", None),
    "best_of": ({"best_of": 2}, "best_of", None),
    "suffix": ({"suffix": "."}, "suffix", "unknown_field"),
    "unknown": ({"frobnicate": None, "shine": 1}, "shine", "unknown_field"),
    "within": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown_field"),
    "without a stream": ({"stream_options": {"include_usage": True}}, "stream_options", None),
    "rank": ({"dp_rank": 7}, "dp_rank", None),
    "token": ({"prompt": [5, 10**6]}, "prompt", None),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_a_bad_request_error_with_its_field(calls: Completions, name: str) -> None:
    fields, param, code = BAD[name]
    with pytest.raises(openai.BadRequestError) as caught:
        calls.whole(**{"prompt": "a"} | fields)
    error = caught.value
    assert (error.param, error.code, error.type) == (param, code, "invalid_request_error")
    assert param in error.message
    assert isinstance(error.body, dict)
    assert set(error.body) == {"message", "type", "param", "code"}


def test_who_asks_for_more_than_the_context_learns_how_much_there_is(
    calls: Completions,
) -> None:
    request: Content = {"prompt": [9] * 10, "max_tokens": 100, "ignore_eos": True}
    with pytest.raises(openai.BadRequestError) as caught:
        calls.whole(**request)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "context_length_exceeded")
    found = CONTEXT.search(caught.value.message)
    assert found is not None
    limit, num_prompt_tokens, asked = map(int, found.groups())
    assert (limit, num_prompt_tokens, asked) == (MAX_MODEL_LEN, 10, 100)
    request["max_tokens"] = limit - num_prompt_tokens
    assert calls.whole(**request)["usage"]["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("prompt", [[9] * 80, "many words " * 40], ids=["tokens", "text"])
def test_a_prompt_beyond_the_context_is_refused_with_its_length(
    calls: Completions, prompt: Any
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        calls.whole(prompt=prompt, max_tokens=1)
    found = CONTEXT.search(caught.value.message)
    assert found is not None
    assert int(found[1]) == MAX_MODEL_LEN <= int(found[2])
    assert (caught.value.param, caught.value.code) == ("prompt", "context_length_exceeded")


def test_another_model_is_a_not_found_error(calls: Completions) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        calls.whole(prompt="a", model="gpt-4")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    with pytest.raises(openai.NotFoundError):
        calls.client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        calls.client.embeddings.create(model="gpt-4", input="a")


def test_another_key_is_an_authentication_error(calls: Completions) -> None:
    client = calls.client.with_options(api_key="other")
    with pytest.raises(openai.AuthenticationError) as caught:
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_too_many_at_a_time_are_a_rate_limit_error(calls: Completions) -> None:
    create: Any = calls.client.completions.create
    request = {"model": "tiny_model", "prompt": "a", "max_tokens": 60, "stream": True}
    streams = [create(**request, extra_body={"ignore_eos": True}) for _ in range(2)]
    with pytest.raises(openai.RateLimitError) as caught:
        calls.whole(prompt="a")
    assert caught.value.response.headers["retry-after"] == "1"
    for stream in streams:
        stream.close()
    calls.served.check_idle()
    calls.whole(prompt="a")


def test_a_large_body_is_a_status_error(calls: Completions) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        calls.whole(prompt="x" * 50_001)
    assert caught.value.status_code == 413


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b'{"prompt": "\xff"}', b'{"a": NaN}'])
def test_what_is_no_json_object_is_refused(served: Served, body: bytes) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with served.client(headers=headers) as client:
        answer = client.post("/v1/completions", content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_fault_within_a_stream_is_an_event(calls: Completions) -> None:
    create: Any = calls.client.completions.create
    request = {"model": "tiny_model", "prompt": "a", "max_tokens": 60, "stream": True}
    stream = create(**request, extra_body={"ignore_eos": True})
    next(stream)
    [job] = calls.served.state.jobs._running.values()
    handle = job.handles[0]
    handle.loop.call_soon_threadsafe(handle.fail, RequestFailed("its logits are NaN"))
    with pytest.raises(openai.APIError, match="its logits are NaN") as caught:
        list(islice(stream, 1000))
    assert caught.value.code == "request_failed"
