"""/v1/completions, as the openai client and clients without one see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from openai import OpenAI

from dp_runtime import SamplingParams
from tests.dp_runtime.server.served import MODEL, Served, experts_of, serving

PROMPT = "The list of arguments"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(enable_return_routed_experts=True) as running:
        yield running
        running.check_idle()


@pytest.fixture
def client(served: Served) -> OpenAI:
    return OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_the_answer_is_that_of_the_engine(served: Served, client: OpenAI) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0, logprobs=2)
    expected = served.generate([PROMPT], params)[0]
    answer: Any = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=2
    )
    choice = answer.choices[0]
    assert choice.text == expected.text
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert expected.logprobs is not None
    assert choice.logprobs.token_logprobs == [entry.logprob for entry in expected.logprobs]
    assert "".join(choice.logprobs.tokens or []) == choice.text


@pytest.mark.parametrize("n", [1, 3])
def test_usage_says_how_much_of_a_prompt_was_cached(client: OpenAI, n: int) -> None:
    create: Any = client.completions.create
    prompt = [*range(100, 250), n]  # two pages of 64 tokens and more
    own = {"dp_rank": 0, "cache_salt": f"salt {n}"}
    request: dict[str, Any] = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "extra_body": own}
    found = [create(**request, n=n).usage.prompt_tokens_details.cached_tokens for _ in range(2)]
    options = {"include_usage": True}
    *_, last = create(**request, n=n, stream=True, stream_options=options)
    found.append(last.usage.prompt_tokens_details.cached_tokens)
    assert found == [0, 128, 128]


@pytest.mark.parametrize("n", [1, 3])
def test_joined_deltas_are_the_whole_answer(client: OpenAI, n: int) -> None:
    request: dict[str, Any] = {
        "model": MODEL, "prompt": [PROMPT, "A class"], "max_tokens": 10, "seed": 5, "n": n,
        "logprobs": 1, "echo": True,
    }  # fmt: skip
    create: Any = client.completions.create
    whole = create(**request)
    texts, tokens, reasons = [""] * 2 * n, [0] * 2 * n, [""] * 2 * n
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks: list[Any] = list(create(**request, stream=True, stream_options=options))
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += len(choice.logprobs.tokens)
            reasons[choice.index] = choice.finish_reason or ""
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [len(choice.logprobs.tokens) for choice in whole.choices]
    assert reasons == ["length"] * 2 * n
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)


def test_scoring_a_batch_of_token_ids(served: Served, client: OpenAI) -> None:
    prompts = [[5, 6, 7, 8], [9, 10]]
    params = SamplingParams(max_tokens=1, temperature=0.0, logprobs=1, prompt_logprobs=1)
    expected = served.generate([*prompts], params)
    request: dict[str, Any] = {
        "model": MODEL, "prompt": prompts, "temperature": 0, "logprobs": 1, "echo": True,
    }  # fmt: skip
    for max_tokens in (1, 0):
        answer: Any = client.completions.create(max_tokens=max_tokens, **request)
        for choice, output in zip(answer.choices, expected, strict=True):
            scores = [entry.logprob for entry in output.prompt_logprobs or ()]
            made = [entry.logprob for entry in output.logprobs or ()][:max_tokens]
            assert choice.logprobs.token_logprobs[0] is None
            assert choice.logprobs.token_logprobs[1:] == pytest.approx([*scores, *made], abs=1e-4)
            assert choice.logprobs.top_logprobs[0] is None
            assert all(choice.logprobs.top_logprobs[1:])
            assert (
                len(choice.logprobs.text_offset or []) == len(output.prompt_token_ids) + max_tokens
            )
        assert answer.usage.completion_tokens == 2 * max_tokens


def test_token_ids_are_returned_where_asked_for(served: Served) -> None:
    body = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True, "return_token_ids": True}
    choice = served.post("/v1/completions", **body).json()["choices"][0]
    assert choice["prompt_token_ids"] == [5, 6]
    assert len(choice["token_ids"]) == 3


BAD: dict[str, tuple[dict[str, Any], int, str | None]] = {
    "unknown field": ({"frobnicate": 1}, 400, "frobnicate"),
    "unknown field within": ({"stream_options": {"x": 1}}, 400, "stream_options.x"),
    "best_of": ({"best_of": 3}, 400, "best_of"),
    "type": ({"max_tokens": "7"}, 400, "max_tokens"),
    "range": ({"temperature": -1}, 400, "temperature"),
    "no choices": ({"n": 0}, 400, "n"),
    "too many choices": ({"n": 10**6}, 400, "n"),
    "no such rank": ({"dp_rank": 2}, 400, "dp_rank"),
    "empty prompt": ({"prompt": ""}, 400, "prompt"),
    "no prompts": ({"prompt": []}, 400, "prompt"),
    "token": ({"prompt": [10**8]}, 400, "prompt"),
    "model": ({"model": "gpt"}, 404, "model"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_told_with_its_field(served: Served, name: str) -> None:
    fields, status, param = BAD[name]
    answer = served.post("/v1/completions", **{"prompt": "a"} | fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


def test_null_is_as_good_as_absent(served: Served) -> None:
    nulls = dict.fromkeys(("stop", "logit_bias", "seed", "n", "stream", "logprobs", "best_of"))
    assert served.post("/v1/completions", prompt="a", max_tokens=1, **nulls).status_code == 200


def test_a_rank_can_be_chosen(served: Served) -> None:
    for rank in (0, 1):
        before = served.engine._core.report().output_tokens_by_rank
        served.post("/v1/completions", prompt="a", max_tokens=5, ignore_eos=True, dp_rank=rank)
        after = served.engine._core.report().output_tokens_by_rank
        assert [b - a for a, b in zip(before, after)] == [5 * (rank == each) for each in (0, 1)]


@pytest.mark.parametrize("stream", [False, True])
def test_experts_come_with_the_end_of_each_choice(served: Served, stream: bool) -> None:
    body = {"prompt": [PROMPT, "A class"], "max_tokens": 5, "temperature": 0, "n": 2}
    params = SamplingParams(max_tokens=5, temperature=0.0, return_routed_experts=True)
    expected = served.generate([PROMPT, "A class"], params)
    found = experts_of(served, "/v1/completions", stream, **body)
    assert len(found) == 4
    for index, experts in enumerate(found):
        due = expected[index // 2].routed_experts
        assert due is not None
        assert np.array_equal(experts, due)
    assert experts_of(served, "/v1/completions", stream, **body, return_routed_experts=False) == []
