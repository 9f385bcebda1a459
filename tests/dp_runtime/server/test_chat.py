"""/v1/chat/completions, as the openai client and clients without one see it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai import AsyncOpenAI, BadRequestError, OpenAI

from dp_runtime import SamplingParams
from tests.dp_runtime.server.served import MODEL, Served, experts_of, serving

CHAT = [{"role": "system", "content": "Say é."}, {"role": "user", "content": "Return a list"}]
PROMPT = (
    "<|im_start|>system\nSay é.<|im_end|>\n<|im_start|>user\nReturn a list<|im_end|>\n"
    "<|im_start|>assistant\n"
)
BODY: dict[str, Any] = {"model": MODEL, "messages": CHAT}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(dp_size=1, enable_return_routed_experts=True) as running:
        yield running
        running.check_idle()


@pytest.fixture
def create(served: Served) -> Any:
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
    return client.chat.completions.create


def test_the_answer_is_that_of_the_engine(served: Served, create: Any) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2)
    expected = served.generate([PROMPT], params)[0]
    limits = {"max_tokens": 99, "max_completion_tokens": 12}
    answer = create(**BODY, **limits, temperature=0, logprobs=True, top_logprobs=2)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert expected.logprobs is not None
    for entry, theirs in zip(choice.logprobs.content, expected.logprobs, strict=True):
        scores = [theirs.logprob, *(top[1] for top in theirs.top)]
        told = [entry.logprob, *(each.logprob for each in entry.top_logprobs)]
        assert told == pytest.approx(scores, abs=1e-3)
    spelled = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert spelled == expected.text.encode()


@pytest.mark.parametrize("n", [1, 3])
def test_joined_deltas_are_the_whole_answer(create: Any, n: int) -> None:
    extra = {"return_token_ids": True, "prompt_logprobs": 1}
    body = {**BODY, "max_tokens": 10, "seed": 5, "n": n, "logprobs": True, "extra_body": extra}
    whole = create(**body)
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(create(**body, stream=True, stream_options=options))
    for choice in whole.choices:
        own = [c for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert own[0].delta.role == "assistant"
        assert all(each.delta.role is None for each in own[1:])
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        entries = [entry for each in own if each.logprobs for entry in each.logprobs.content]
        theirs = choice.logprobs.content
        assert [entry.token for entry in entries] == [entry.token for entry in theirs]
        scores = [entry.logprob for entry in theirs]
        assert [entry.logprob for entry in entries] == pytest.approx(scores, abs=1e-3)
        token_ids = [token for each in own for token in getattr(each, "token_ids", [])]
        assert token_ids == choice.token_ids
        reasons = [each.finish_reason for each in own]
        assert reasons == [*[None] * (len(own) - 1), choice.finish_reason]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [chunk.usage.completion_tokens for chunk in chunks] == sorted(
        chunk.usage.completion_tokens for chunk in chunks
    )
    assert chunks[0].prompt_token_ids == whole.prompt_token_ids
    for scored in (whole.prompt_logprobs, chunks[0].prompt_logprobs):
        assert len(scored) == len(whole.prompt_token_ids)
        assert scored[0] is None
        assert all(scored[1:])


def test_an_answer_may_take_all_the_room_there_is(served: Served, create: Any) -> None:
    answer = create(**BODY, stop=["return", "the", "a"], seed=1)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason in ("return", "the", "a")
    long = [{"role": "user", "content": "a " * 2000}]
    with pytest.raises(BadRequestError, match="maximum context length is 2048 tokens"):
        create(model=MODEL, messages=long, max_tokens=100)
    endless = create(model=MODEL, messages=long, extra_body={"ignore_eos": True})
    assert endless.usage.total_tokens == served.engine.model.max_model_len
    assert 0 < endless.usage.completion_tokens < 40
    assert endless.choices[0].finish_reason == "length"


def test_a_message_goes_on(served: Served, create: Any) -> None:
    chat = [*CHAT, {"role": "assistant", "content": "The list "}]
    params = SamplingParams(max_tokens=8, temperature=0.0)
    expected = served.generate([f"{PROMPT}The list "], params)[0].text
    body: dict[str, Any] = {"model": MODEL, "messages": chat, "max_tokens": 8, "temperature": 0}
    for more in ({}, {"add_generation_prompt": False}, {"echo": True}):
        extra = {"continue_final_message": True, **more}
        whole = create(**body, extra_body=extra).choices[0].message.content
        assert whole == ("The list " if "echo" in more else "") + expected
        chunks = create(**body, extra_body=extra, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_tokens_of_a_chat(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    for more in ({}, {"add_generation_prompt": False}, {"tools": tools}):
        answer = served.post("/tokenize", messages=CHAT, **more).json()
        text = served.post("/detokenize", tokens=answer["tokens"]).json()["prompt"]
        assert answer["count"] == len(answer["tokens"])
        assert text.endswith("assistant\n") != ("add_generation_prompt" in more)
        assert ('"name": "f"' in text) == ("tools" in more)
    for bad in ({}, {"prompt": "a", "messages": CHAT}):
        assert served.post("/tokenize", **bad).status_code == 400


def test_many_tasks_ask_at_a_time(served: Served) -> None:
    async def ask() -> tuple[list[str], list[str]]:
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        create: Any = client.chat.completions.create
        bodies = [BODY | {"max_tokens": 6, "seed": seed} for seed in range(8)]

        async def streamed(body: dict[str, Any]) -> str:
            chunks = await create(**body, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

        whole = await asyncio.gather(*(create(**body) for body in bodies))
        texts = [answer.choices[0].message.content for answer in whole]
        return texts, list(await asyncio.gather(*map(streamed, bodies)))

    texts, joined = asyncio.run(ask())
    assert texts == joined
    assert len(set(texts)) > 1


def test_answers_end_while_the_server_drains(served: Served, create: Any) -> None:
    options = {"include_usage": True}
    chunks = create(**BODY, max_tokens=40, stream=True, stream_options=options)
    first = next(chunks)
    served.state.draining = True
    try:
        *_, last = chunks
    finally:
        served.state.draining = False
    assert first.choices[0].delta.role == "assistant"
    assert last.usage.completion_tokens > 1


USER = {"role": "user", "content": "a"}
TOOL = {"type": "function", "function": {"name": "f"}}
BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "no messages": ({"messages": None}, 400, "messages"),
    "empty": ({"messages": []}, 400, "messages"),
    "no object": ({"messages": ["a"]}, 400, "messages[0]"),
    "role": ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages[0].role"),
    "unknown in a message": ({"messages": [USER | {"x": 1}]}, 400, "messages[0].x"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400, "messages[0].content[0].image_url",
    ),
    "surrogate": ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
    "too long": ({"messages": [{"role": "user", "content": "a b " * 3000}]}, 400, "messages"),
    "unknown field": ({"frobnicate": 1}, 400, "frobnicate"),
    "max_tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "top_logprobs alone": ({"top_logprobs": 1}, 400, "top_logprobs"),
    "too many top_logprobs": ({"logprobs": True, "top_logprobs": 65}, 400, "top_logprobs"),
    "echo": ({"echo": True}, 400, "echo"),
    "both": (
        {"add_generation_prompt": True, "continue_final_message": True},
        400, "continue_final_message",
    ),
    "template": ({"chat_template": "{{ messages }}"}, 400, "chat_template"),
    "hidden variable": (
        {"chat_template_kwargs": {"tools": 1}},
        400, "chat_template_kwargs.tools",
    ),
    "tool": ({"tools": [{"type": "code"}]}, 400, "tools[0].type"),
    "tool_choice": ({"tools": [TOOL], "tool_choice": "any"}, 400, "tool_choice"),
    "no tools": ({"tool_choice": "required"}, 400, "tool_choice"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_told_with_its_field(served: Served, name: str) -> None:
    fields, status, param = BAD[name]
    content = json.dumps({"messages": [USER], "max_tokens": 1} | fields)
    with served.client() as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/v1/chat/completions", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


@pytest.mark.parametrize("stream", [False, True])
def test_experts_come_with_the_end(served: Served, stream: bool) -> None:
    params = SamplingParams(max_tokens=5, temperature=0.0, return_routed_experts=True)
    (expected,) = served.generate([PROMPT], params)
    body = BODY | {"max_tokens": 5, "temperature": 0}
    (experts,) = experts_of(served, "/v1/chat/completions", stream, **body)
    assert expected.routed_experts is not None
    assert np.array_equal(experts, expected.routed_experts)


def test_a_model_of_texts_refuses_images(served: Served) -> None:
    content = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": "data:"}]
    for path in ("/v1/chat/completions", "/tokenize"):
        answer = served.post(path, messages=[{"role": "user", "content": content}])
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["message"].endswith("an image is not allowed; the model reads none")
        assert error["param"] == "messages[0].content[1]"
