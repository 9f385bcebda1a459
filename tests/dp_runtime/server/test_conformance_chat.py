"""Every field of /v1/chat/completions through the openai client, with the Python API as oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError

from dp_runtime import RequestOutput, SamplingParams
from dp_runtime.server.protocol.fields import RANK_HEADER
from tests.dp_runtime.server.openai_calls import (
    ChatCompletions,
    Content,
    check_alike,
    joined,
    told_stop_reason,
)
from tests.dp_runtime.server.served import MODEL, Served, serving

CHAT = [{"role": "user", "content": "Return the list of"}]
FIELDS: dict[str, tuple[Content, Content]] = {  # of the request, and what they are in Python
    "max_tokens": ({"max_tokens": 5, "seed": 1}, {}),
    "max_completion_tokens": ({"max_completion_tokens": 5, "seed": 1}, {"max_tokens": 5}),
    "greedy": ({"temperature": 0}, {}),
    "temperature": ({"temperature": 1.3, "seed": 2}, {}),
    "top_p": ({"top_p": 0.5, "seed": 3}, {}),
    "penalties": ({"presence_penalty": 1.0, "frequency_penalty": -0.5, "temperature": 0}, {}),
    "logit_bias": ({"logit_bias": {"300": 30}, "seed": 4}, {}),
    "stop": ({"stop": ["a", "e"], "temperature": 0, "max_tokens": 40}, {}),
    "logprobs": ({"logprobs": True, "temperature": 0}, {"logprobs": 0}),
    "top_logprobs alone": ({"top_logprobs": 0, "seed": 15}, {}),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 3, "seed": 15}, {"logprobs": 3}),
    "extras": (
        {"top_k": 9, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 3, "seed": 6,
         "stop_token_ids": [0, 9], "bad_words": ["the"], "priority": 2}, {},
    ),
    "text": (
        {"include_stop_str_in_output": True, "stop": "e", "skip_special_tokens": False,
         "ignore_eos": True, "temperature": 0, "max_tokens": 40}, {},
    ),
    "tokens": ({"allowed_token_ids": [300, 301, 302], "truncate_prompt_tokens": 6, "seed": 7}, {}),
    "prompt_logprobs": ({"prompt_logprobs": 1, "temperature": 0}, {}),
}  # fmt: skip
NOT_IN_PYTHON = {"max_completion_tokens", "top_logprobs"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def calls(served: Served) -> ChatCompletions:
    return ChatCompletions(served)


def expected_of(served: Served, *params: Content) -> list[RequestOutput]:
    tokens = served.post("/tokenize", messages=CHAT).json()["tokens"]
    own = [SamplingParams.from_fields(each) for each in params]
    return served.generate([tokens] * len(params), own)


@pytest.fixture(scope="module")
def answers(calls: ChatCompletions) -> dict[str, tuple[Content, RequestOutput]]:
    """To a request with each field: the answer, and what the Python API says."""
    requests: dict[str, Content] = {}
    params: list[Content] = []
    for name, (fields, in_python) in FIELDS.items():
        limit = {} if name.startswith("max_") else {"max_tokens": 8}
        requests[name] = {"messages": CHAT, "return_token_ids": True} | limit | fields
        own = {n: value for n, value in fields.items() if n not in NOT_IN_PYTHON}
        params.append(limit | own | in_python)
    expected = expected_of(calls.served, *params)
    found = calls.all_in_every_way(requests)
    return {name: (found[name], output) for name, output in zip(FIELDS, expected)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_does_what_it_does_in_python(
    answers: dict[str, tuple[Content, RequestOutput]], name: str
) -> None:
    answer, expected = answers[name]
    choice = answer["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert choice["token_ids"] == list(expected.token_ids)
    assert answer["prompt_token_ids"] == list(expected.prompt_token_ids)
    reasons = (choice["finish_reason"], choice["stop_reason"])
    assert reasons == (expected.finish_reason, told_stop_reason(expected))
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids)
    assert usage["completion_tokens"] == len(expected.token_ids)
    check_logprobs(choice, expected, FIELDS[name][0].get("top_logprobs", 0))


def check_logprobs(choice: Content, expected: RequestOutput, num_top: int) -> None:
    if expected.logprobs is None:
        assert choice["logprobs"] is None
        return
    for entry, own in zip(choice["logprobs"]["content"], expected.logprobs, strict=True):
        assert entry["logprob"] == pytest.approx(own.logprob, abs=1e-4)
        tops = [top["logprob"] for top in entry["top_logprobs"]]
        assert tops == pytest.approx([logprob for _, logprob in own.top[:num_top]], abs=1e-4)


def test_choices_differ_and_are_what_python_says(calls: ChatCompletions) -> None:
    request = {"messages": CHAT, "n": 3, "seed": 8, "max_tokens": 7, "logprobs": True}
    answer = calls.in_every_way(request)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    own = expected_of(calls.served, *({"max_tokens": 7, "seed": 8 + number} for number in range(3)))
    assert texts == [output.text for output in own]
    assert len(set(texts)) > 1
    assert answer["usage"]["completion_tokens"] == 21
    begins = [chunk["choices"][0] for chunk in calls.chunks(**request)[:3]]
    assert [(each["index"], each["delta"]["role"]) for each in begins] == [
        (index, "assistant") for index in range(3)
    ]


def test_usage_comes_when_it_was_asked_for(calls: ChatCompletions) -> None:
    request: Content = {"messages": CHAT, "max_tokens": 5, "ignore_eos": True}
    assert all("usage" not in chunk for chunk in calls.chunks(**request))
    at_end = calls.chunks(**request, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in at_end[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    always = calls.chunks(**request, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in always]
    assert counts == sorted(counts)
    assert counts[-1] == at_end[-1]["usage"]["completion_tokens"] == 5
    assert (at_end[-1]["choices"], always[-1]["choices"]) == ([], [])


def test_nothing_is_missed_by_who_reads_only_what_openai_names(calls: ChatCompletions) -> None:
    request: Content = {"messages": CHAT, "max_tokens": 4, "temperature": 0}
    unused = {"user": "me", "metadata": {"run": "1"}, "service_tier": "auto"}
    nulls = dict.fromkeys(("tools", "logit_bias", "stop", "top_logprobs", "seed", "frobnicate"))
    plain = calls.whole(**request)["choices"]
    assert joined(calls.chunks(**request, **unused, **nulls))["choices"] == plain


@pytest.mark.parametrize("rank", [0, 1])
def test_a_header_pins_the_rank(calls: ChatCompletions, rank: int) -> None:
    core = calls.served.engine._core
    before = core.report().output_tokens_by_rank
    chat: Any = CHAT
    calls.client.chat.completions.create(
        model=MODEL, messages=chat, max_tokens=5, extra_body={"ignore_eos": True},
        extra_headers={RANK_HEADER: str(rank)},
    )  # fmt: skip
    made = [b - a for a, b in zip(before, core.report().output_tokens_by_rank)]
    assert made == [5 * (rank == each) for each in (0, 1)]


def test_a_chat_beyond_the_context_is_told_as_openai_tells_it(calls: ChatCompletions) -> None:
    long = [{"role": "user", "content": "a word " * 2000}]
    for request, param in (({"messages": long}, "messages"), ({"messages": CHAT}, "max_tokens")):
        with pytest.raises(BadRequestError) as caught:
            calls.whole(**request, max_tokens=2048)
        assert (caught.value.param, caught.value.code) == (param, "context_length_exceeded")
        assert "maximum context length is 2048 tokens" in caught.value.message


def test_the_clients_own_joining_gives_the_whole_answer(calls: ChatCompletions) -> None:
    request: Any = {
        "model": MODEL, "messages": CHAT, "max_tokens": 60, "seed": 3, "logprobs": True, "n": 2,
        "stop": ["e", "a"],
    }  # fmt: skip
    options: Any = {"include_usage": True}
    whole = calls.client.chat.completions.create(**request)
    with calls.client.chat.completions.stream(**request, stream_options=options) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.usage == whole.usage
    for own, choice in zip(final.choices, whole.choices, strict=True):
        assert own.message.content == choice.message.content
        assert own.finish_reason == choice.finish_reason == "stop"
        assert own.logprobs is not None
        check_alike(own.logprobs.to_dict(), choice.logprobs.to_dict())
    assert events.count("content.done") == events.count("logprobs.content.done") == 2
