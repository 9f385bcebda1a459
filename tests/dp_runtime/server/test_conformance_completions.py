"""Every field of /v1/completions through the openai client, with the Python API as oracle."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError

from dp_runtime import RequestOutput, SamplingParams
from dp_runtime.server.protocol.fields import RANK_HEADER
from tests.dp_runtime.server.openai_calls import (
    USAGE,
    Completions,
    Content,
    check_alike,
    joined,
    told_stop_reason,
)
from tests.dp_runtime.server.served import Served, serving

PROMPT = "Return the sum of the"
TOKENS = [40, 41, 42, 43, 44]
FIELDS: dict[str, Content] = {  # each is a field of SamplingParams too
    "greedy": {"temperature": 0},
    "seed": {"seed": 11},
    "temperature": {"temperature": 0.7, "seed": 1},
    "top_p": {"top_p": 0.6, "seed": 2},
    "top_k": {"top_k": 5, "seed": 3},
    "all of top_k": {"top_k": -1, "seed": 3},
    "min_p": {"min_p": 0.2, "seed": 4},
    "presence_penalty": {"presence_penalty": 1.5, "temperature": 0},
    "frequency_penalty": {"frequency_penalty": 1.5, "temperature": 0},
    "repetition_penalty": {"repetition_penalty": 1.4, "temperature": 0},
    "logit_bias": {"logit_bias": {"300": 100.0, "301": 99.5}, "seed": 5},
    "one stop": {"stop": "e", "temperature": 0, "max_tokens": 40},
    "stops": {"stop": [" of", "\n"], "temperature": 0, "max_tokens": 40},
    "stops that tokens share": {
        "stop": [" the s", "rn", "f t"], "logprobs": 1, "temperature": 0, "max_tokens": 40,
    },
    "stop_token_ids": {"stop_token_ids": list(range(200, 600)), "temperature": 0},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {"0": 50.0}, "temperature": 0},
    "eos": {"logit_bias": {"0": 200.0}, "temperature": 0},
    "min_tokens": {"min_tokens": 4, "logit_bias": {"0": 200.0}, "temperature": 0},
    "skip_special_tokens": {
        "skip_special_tokens": False, "ignore_eos": True, "logit_bias": {"0": 200.0}, "seed": 6,
    },
    "include_stop_str_in_output": {
        "include_stop_str_in_output": True, "stop": "e", "temperature": 0, "max_tokens": 40,
    },
    "bad_words": {"bad_words": ["of", " list", "\n"], "temperature": 0, "max_tokens": 20},
    "allowed_token_ids": {"allowed_token_ids": [300, 301, 302, 400], "seed": 7},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 3, "temperature": 0},
    "cache_salt": {"cache_salt": "mine", "temperature": 0},
    "priority": {"priority": -3, "temperature": 0},
    "logprobs": {"logprobs": 3, "temperature": 0},
    "no top logprobs": {"logprobs": 0, "temperature": 0},
    "prompt_logprobs": {"prompt_logprobs": 2, "temperature": 0},
}  # fmt: skip

Answers = dict[str, tuple[Content, RequestOutput]]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as running:
        yield running
        running.check_idle()


@pytest.fixture(scope="module")
def calls(served: Served) -> Completions:
    return Completions(served)


def check_choice(choice: Content, expected: RequestOutput) -> None:
    assert choice["text"] == expected.text
    assert choice["token_ids"] == list(expected.token_ids)
    assert choice["prompt_token_ids"] == list(expected.prompt_token_ids)
    reasons = (choice["finish_reason"], choice["stop_reason"])
    assert reasons == (expected.finish_reason, told_stop_reason(expected))
    if expected.logprobs is None:
        assert choice["logprobs"] is None
    else:
        own = [entry.logprob for entry in expected.logprobs]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(own, abs=1e-4)
    if expected.prompt_logprobs is not None:
        shown = choice["prompt_logprobs"]
        assert shown[0] is None
        for entry, tops in zip(expected.prompt_logprobs, shown[1:], strict=True):
            assert set(tops) == {str(token) for token, _ in [(entry.token_id, 0), *entry.top]}
            assert tops[str(entry.token_id)]["logprob"] == pytest.approx(entry.logprob, abs=1e-4)


@pytest.fixture(scope="module")
def answers(calls: Completions) -> Answers:
    """To a request with each field: the answer, and what the Python API says."""
    params: list[Content] = [{"max_tokens": 8} | fields for fields in FIELDS.values()]
    prompts: list[Any] = [PROMPT if number % 2 else TOKENS for number in range(len(FIELDS))]
    requests: dict[str, Content] = {
        name: {"prompt": prompt, "return_token_ids": True} | own
        for name, prompt, own in zip(FIELDS, prompts, params)
    }
    expected = calls.served.generate(prompts, [SamplingParams.from_fields(own) for own in params])
    found = calls.all_in_every_way(requests)
    return {name: (found[name], output) for name, output in zip(FIELDS, expected)}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_does_what_it_does_in_python(answers: Answers, name: str) -> None:
    answer, expected = answers[name]
    check_choice(answer["choices"][0], expected)
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_token_ids)
    assert usage["completion_tokens"] == len(expected.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize(
    "prompt", [[PROMPT, "A class that", "def"], [TOKENS, [7], [300, 301]]], ids=["texts", "ids"]
)
def test_batches_with_several_choices(calls: Completions, prompt: Any, echo: bool) -> None:
    request: Content = {
        "prompt": prompt, "n": 2, "max_tokens": 6, "seed": 9, "echo": echo, "logprobs": 2,
        "return_token_ids": True,
    }  # fmt: skip
    whole = calls.in_every_way(request)
    assert [choice["index"] for choice in whole["choices"]] == list(range(6))
    for number, choice in enumerate(whole["choices"]):
        params = SamplingParams(max_tokens=6, seed=9 + number % 2, logprobs=2, prompt_logprobs=2)
        expected = calls.served.generate([prompt[number // 2]], params)[0]
        begin = as_text(calls, expected.prompt_token_ids) if echo else ""
        assert choice["text"] == begin + expected.text
        scores = [entry.logprob for entry in expected.logprobs or ()]
        if echo:
            of_prompt = [entry.logprob for entry in expected.prompt_logprobs or ()]
            scores = [*of_prompt, *scores]
            assert choice["logprobs"]["top_logprobs"][0] is None
        shown = choice["logprobs"]["token_logprobs"]
        assert shown[echo:] == pytest.approx(scores, abs=1e-4)
        check_offsets(choice)


def as_text(calls: Completions, token_ids: Any) -> str:
    tokenizer = calls.served.engine.tokenizer
    assert tokenizer is not None
    return tokenizer.decode(token_ids, False)


def check_offsets(choice: Content) -> None:
    """Tokens stand in the text where text_offset says."""
    columns, hides_last = choice["logprobs"], choice["finish_reason"] == "stop"
    tokens = [*zip(columns["tokens"], columns["text_offset"], strict=True)]
    for token, offset in tokens[: len(tokens) - hides_last]:
        if "\ufffd" in token:
            return  # a part of a character, after which texts and tokens differ in length
        assert choice["text"][offset : offset + len(token)] == token


def test_usage_comes_when_it_was_asked_for(calls: Completions) -> None:
    request: Content = {"prompt": [PROMPT, "A class"], "max_tokens": 5, "ignore_eos": True}
    without = calls.chunks(**request)
    assert all("usage" not in chunk for chunk in without)
    at_end = calls.chunks(**request, **USAGE)
    assert all(chunk["usage"] is None and chunk["choices"] for chunk in at_end[:-1])
    assert at_end[-1]["choices"] == []
    options = {"include_usage": True, "continuous_usage_stats": True}
    always = calls.chunks(**request, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in always]
    assert counts == sorted(counts)
    assert counts[-1] == at_end[-1]["usage"]["completion_tokens"] == 10
    prompts = {chunk["usage"]["prompt_tokens"] for chunk in always}
    assert prompts == {at_end[-1]["usage"]["prompt_tokens"]}


def test_tokens_may_be_named_by_their_ids(calls: Completions) -> None:
    request: Content = {"prompt": TOKENS, "max_tokens": 3, "echo": True, "logprobs": 2}
    names = {"return_tokens_as_token_ids": True, "return_token_ids": True, "temperature": 0}
    choice = calls.whole(**request, **names)["choices"][0]
    ids = [*TOKENS, *choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in ids]
    for token, tops in zip(ids[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
        assert f"token_id:{token}" in tops


def test_nothing_new_is_shown_where_only_scores_are_wanted(calls: Completions) -> None:
    request: Content = {"prompt": [PROMPT, "A class"], "max_tokens": 0, "echo": True, "logprobs": 1}
    whole = calls.whole(**request)
    assert [choice["text"] for choice in whole["choices"]] == [PROMPT, "A class"]
    for choice in whole["choices"]:
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
    assert whole["usage"]["completion_tokens"] == 0
    check_alike(joined(calls.chunks(**request, **USAGE)), whole)


def test_ids_and_names_are_those_that_were_given(calls: Completions) -> None:
    chunks = calls.chunks(prompt="a", max_tokens=2, request_id="mine", user="me")
    assert {chunk["id"] for chunk in chunks} == {"cmpl-mine"}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_header_pins_the_rank(calls: Completions, rank: int) -> None:
    core = calls.served.engine._core
    before = core.report().output_tokens_by_rank
    calls.client.completions.create(
        model="tiny_model", prompt=PROMPT, max_tokens=5, extra_body={"ignore_eos": True},
        extra_headers={RANK_HEADER: str(rank)},
    )  # fmt: skip
    made = [b - a for a, b in zip(before, core.report().output_tokens_by_rank)]
    assert made == [5 * (rank == each) for each in (0, 1)]


@pytest.mark.parametrize(
    ("header", "param"), [("2", "dp_rank"), ("-1", "dp_rank"), ("1", "dp_rank"), ("x", RANK_HEADER)]
)
def test_a_header_that_names_no_rank_is_refused(
    calls: Completions, header: str, param: str
) -> None:
    with pytest.raises(BadRequestError) as caught:
        calls.client.completions.create(
            model="tiny_model", prompt=PROMPT, extra_headers={RANK_HEADER: header},
            extra_body={"dp_rank": 0} if header == "1" else None,
        )  # fmt: skip
    assert caught.value.param == param


def test_chunks_of_several_tokens_make_the_same_answer(answers: Answers) -> None:
    """Drafts that are accepted come in one chunk; nothing else differs."""
    names = ("greedy", "stops that tokens share", "logprobs", "min_tokens")
    params: dict[str, Content] = {name: {"max_tokens": 8} | FIELDS[name] for name in names}
    with serving(dp_size=1, speculative_num_steps=2) as drafting:
        calls = Completions(drafting)
        requests = {
            name: {"prompt": answers[name][1].prompt_token_ids, "return_token_ids": True} | own
            for name, own in params.items()
        }
        for name, answer in calls.all_in_every_way(requests).items():
            assert answer["choices"][0]["text"] == answers[name][1].text
            assert answer["choices"][0]["token_ids"] == list(answers[name][1].token_ids)
        chunks = calls.chunks(prompt=PROMPT, max_tokens=60, temperature=0, return_token_ids=True)
        lengths = [len(choice["token_ids"]) for chunk in chunks for choice in chunk["choices"]]
        assert (sum(lengths), max(lengths) > 1) == (60, True)
