"""What engines share beyond OpenAI's fields, through the whole runtime over threads."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import NoBadWordsLogitsProcessor

from dp_runtime import Engine, RequestOutput, SamplingParams
from dp_runtime.core.request import FinishReason
from dp_runtime.errors import RequestFailed
from dp_runtime.text.bad_words import encoded_bad_words
from dp_runtime.text.tokenizer import Tokenizer
from tests.reference import NearTie, Reference, near_ties
from tests.serving import check_pages_free
from tests.speculative_cases import TRAINED, engine_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
PROMPTS = ["The list of arguments", "If the file does not exist,", "Return a new string"]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(TRAINED.model)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engine_of(TRAINED, 0) as engine:
        yield engine


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[RequestOutput]:
    return engine.generate(PROMPTS, GREEDY)


def tokenizer_of(engine: Engine) -> Tokenizer:
    assert engine.tokenizer is not None
    return engine.tokenizer


@pytest.fixture(scope="module")
def bad_words(plain: list[RequestOutput]) -> list[str]:
    """Words that the outputs would have."""
    return sorted({word for one in plain for word in re.findall("[a-z]{3,}", one.text)[2::3]})


def check_masked(
    reference: Reference, outputs: Sequence[RequestOutput], words: Sequence[Sequence[int]]
) -> None:
    """Assert that each token is the oracle's best that ends none of the words."""
    mask = NoBadWordsLogitsProcessor([list(word) for word in words])
    sequences = [(*output.prompt_token_ids, *output.token_ids) for output in outputs]
    for output, logits in zip(outputs, reference.logits(sequences), strict=True):
        ahead = logits[len(output.prompt_token_ids) - 1 : -1]
        before = (torch.tensor([output.token_ids[:n]]).long() for n in range(len(ahead)))
        masked = [mask(tokens, row[None].clone())[0] for tokens, row in zip(before, ahead)]
        for tie in near_ties(output.token_ids, torch.stack(masked)):
            warnings.warn(tie, NearTie, stacklevel=2)


RUNS: dict[str, tuple[int, dict[str, Any]]] = {
    "overlap": (0, {"overlap": True}),
    "preempted": (0, {"dp_size": 1, "num_pages": 9, "overlap": True}),
    "drafts": (3, {}),
    "drafts overlap, preempted": (4, {"dp_size": 1, "num_pages": 10, "overlap": True}),
}


@pytest.mark.parametrize("run", RUNS)
def test_bad_words(
    run: str, plain: list[RequestOutput], bad_words: list[str], reference: Reference
) -> None:
    num_drafts, fields = RUNS[run]
    params = replace(GREEDY, bad_words=bad_words)
    with engine_of(TRAINED, num_drafts, **fields) as engine:
        *outputs, undisturbed = engine.generate([*PROMPTS, PROMPTS[0]], [*[params] * 3, GREEDY])
        report = engine.report()
        check_pages_free(engine)
        words = encoded_bad_words(bad_words, tokenizer_of(engine), engine.model.vocab_size)
    assert {len(word) > 1 for word in words} == {False, True}
    check_masked(reference, outputs, words)
    assert undisturbed.token_ids == plain[0].token_ids
    assert all(one.token_ids != other.token_ids for one, other in zip(outputs, plain))
    assert report.preemptions > 0 or "preempted" not in run
    assert report.drafts_accepted > 0 or not num_drafts


def test_allowed_token_ids(engine: Engine, plain: list[RequestOutput]) -> None:
    allowed = sorted({*plain[0].token_ids[::2]})
    few = replace(GREEDY, allowed_token_ids=allowed)
    drawn = replace(few, temperature=1.0, seed=3)
    outputs = engine.generate([PROMPTS[0]] * 3, [few, drawn, GREEDY])
    assert all({*one.token_ids} <= {*allowed} for one in outputs[:2])
    assert len({*outputs[1].token_ids}) > 5
    assert outputs[2].token_ids == plain[0].token_ids


def streamed(engine: Engine, prompt: str, params: SamplingParams) -> tuple[str, tuple[int, ...]]:
    deltas = list(engine.stream(prompt, params))
    token_ids = tuple(token for delta in deltas for token in delta.token_ids)
    return "".join(delta.text for delta in deltas), token_ids


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_string_that_ended_the_text(
    include: bool, engine: Engine, plain: list[RequestOutput]
) -> None:
    text = plain[0].text
    stop = text[60:67]
    due = text[: text.index(stop) + len(stop) * include]
    params = replace(GREEDY, stop=[stop, "nowhere"], include_stop_str_in_output=include)
    (output,) = engine.generate([PROMPTS[0]], params)
    assert (output.text, output.stop_reason) == (due, stop)
    assert streamed(engine, PROMPTS[0], params) == (due, output.token_ids)
    assert tokenizer_of(engine).decode(output.token_ids).startswith(text[: len(due)])


@pytest.mark.parametrize("include", [False, True])
def test_the_stop_token_that_ended_the_text(
    include: bool, engine: Engine, plain: list[RequestOutput]
) -> None:
    """Its text is left out by default, as in vLLM; the token is always there."""
    stop = plain[0].token_ids[20]
    token_ids = plain[0].token_ids[: plain[0].token_ids.index(stop) + 1]
    shorter = replace(GREEDY, max_tokens=len(token_ids) - (not include))
    (due,) = engine.generate([PROMPTS[0]], shorter)
    params = replace(GREEDY, stop_token_ids=[stop], include_stop_str_in_output=include)
    (output,) = engine.generate([PROMPTS[0]], params)
    assert (output.text, output.token_ids, output.stop_reason) == (due.text, token_ids, stop)
    assert due.text != plain[0].text[: len(due.text) + 1]
    assert streamed(engine, PROMPTS[0], params) == (due.text, token_ids)


def test_an_end_of_text_token_is_text_only_where_both_fields_say_so(engine: Engine) -> None:
    (eos, *_) = engine.model.eos_token_ids
    spelt = tokenizer_of(engine).decode([eos], skip_special_tokens=False)
    ends = replace(GREEDY, ignore_eos=False, logit_bias={eos: 1e9})
    texts = [
        engine.generate(
            [PROMPTS[0]],
            replace(ends, skip_special_tokens=skip, include_stop_str_in_output=include),
        )[0].text
        for skip in (False, True)
        for include in (False, True)
    ]
    assert texts == ["", spelt, "", ""]


def test_scores_of_a_prompt_are_there_with_its_first_token(engine: Engine) -> None:
    """An echo needs one for each token but the first; a prompt of one token has none."""
    params = replace(GREEDY, max_tokens=1, prompt_logprobs=1, logprobs=1)
    for prompt in ([5], [5, 6, 7]):
        handle = engine.submit(prompt, params)
        entries = handle.result(60).prompt_logprobs
        assert entries is not None
        assert [entry.token_id for entry in entries] == prompt[1:]
        assert all(len(entry.top) == 1 for entry in entries)


def test_the_rest_of_the_context_is_the_limit_where_none_is_given(engine: Engine) -> None:
    prompt = [3] * 100
    (output,) = engine.generate([prompt], replace(GREEDY, max_tokens=None))
    assert len(output.token_ids) == engine.model.max_model_len - len(prompt)
    assert output.finish_reason is FinishReason.LENGTH
    cut = replace(GREEDY, truncate_prompt_tokens=6, max_tokens=3)
    long, short = engine.generate([list(range(5, 25)), list(range(19, 25))], cut)
    assert long.prompt_token_ids == tuple(range(19, 25))
    assert long.token_ids == short.token_ids


def test_a_rank_admits_by_priority() -> None:
    """One request runs at a time; the others have arrived before the first is aborted."""
    priorities = (3, 0, 3, -1)
    params = [replace(GREEDY, max_tokens=2, priority=priority) for priority in priorities]
    with engine_of(TRAINED, 0, dp_size=1, max_num_requests=1, max_model_len=512) as engine:
        first = engine.submit(PROMPTS[0], replace(GREEDY, max_tokens=None, priority=9))
        next(iter(first))
        handles = [engine.submit(PROMPTS[1], one) for one in params]
        assert not first.done
        first.abort()
        for handle in handles:
            handle.result(60)
        began = [handle.arrivals[0][0] for handle in handles]
    assert sorted(range(4), key=began.__getitem__) == [3, 1, 0, 2]


def test_a_request_whose_masks_leave_no_token_fails_alone(engine: Engine) -> None:
    tokenizer = tokenizer_of(engine)
    (token,) = tokenizer.encode("a")
    stuck = replace(GREEDY, allowed_token_ids=[token], bad_words=["aa"])
    other = engine.submit(PROMPTS[1], GREEDY)
    with pytest.raises(RequestFailed, match="its token 1, or bad_words leave none to choose"):
        engine.generate([PROMPTS[0]], stuck)
    assert len(other.result(60).token_ids) == GREEDY.max_tokens
