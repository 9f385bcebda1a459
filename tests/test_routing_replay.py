"""Requests that bring the experts of their tokens, over ranks as threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from dp_runtime import Engine, EngineConfig, RequestOutput, SamplingParams, TokensPrompt
from dp_runtime.core.request import Prompt, RoutedExperts
from tests.product_cases import random_prompt
from tests.reference import Reference, check_greedy, check_logprobs, near_ties
from tests.routed_cases import replaying
from tests.serving import check_pages_free
from tests.speculative_cases import Drafted, engine_of

SERVED = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12, logprobs=1)
TOLD = replace(SERVED, return_routed_experts=True, prompt_logprobs=1)
PROMPTS = [random_prompt(length, "replayed") for length in (1, 5, 40, 9, 20, 33, 3)]
EACH = [TOLD if index % 2 else SERVED for index in range(len(PROMPTS))]
FAULT = "rank=1,step=9,kind=raise"
NUM_EXPERTS, FIELDS = 8, {"enable_return_routed_experts": True, "page_size": 4}


def altered(shape: tuple[int, int, int], seed: int) -> RoutedExperts:
    """Experts at random, of which some layers of some tokens are left free."""
    draw = np.random.default_rng(seed)
    experts = draw.random((*shape[:2], NUM_EXPERTS)).argsort(-1)[..., : shape[2]]
    experts[draw.random(shape[:2]) < 0.3] = -1
    return experts.astype(np.int64)


EXPERTS = [altered((len(prompt) + 11, 2, 2), seed) for seed, prompt in enumerate(PROMPTS[:-2])]
EXPERTS[2] = EXPERTS[2][:25]  # of a part of its prompt


def bring(experts: Sequence[RoutedExperts]) -> list[Prompt]:
    """The prompts with these experts; the last ones bring none, if there are fewer."""
    brought = [TokensPrompt(own, replay_routed_experts=ids) for own, ids in zip(PROMPTS, experts)]
    return [*brought, *PROMPTS[len(brought) :]]


@pytest.mark.parametrize(
    ("num_steps", "dp_size", "fields"),
    [
        (0, 1, {"overlap": True, "max_num_tokens": 16, "num_pages": 36}),
        (0, 3, {"overlap": True, "padding": "ragged", "moe_sharding": "tp", "inject": FAULT}),
        pytest.param(
            0,
            4,
            {"overlap": False, "poison_padding": True, "max_num_tokens": 24},
            marks=pytest.mark.slow,
        ),
        (3, 2, {"overlap": True, "max_num_tokens": 48}),
    ],
)
def test_experts_that_are_brought_are_taken(
    num_steps: int,
    dp_size: int,
    fields: dict[str, Any],
    drafted_of: Callable[[str], Drafted],
    oracle_of: Callable[[str], Reference],
) -> None:
    """Requests with the same prompts come before and after, and would share its pages."""
    reference = oracle_of("agreeing")
    with engine_of(drafted_of("agreeing"), num_steps, dp_size, **(FIELDS | fields)) as engine:
        first = engine.generate(bring(EXPERTS), EACH)
        plain = engine.generate(PROMPTS, SERVED)
        again = engine.generate(bring(EXPERTS), EACH)
        check_pages_free(engine)
    usual = [*plain, *first[-2:], *again[-2:]]
    check_greedy(reference, usual, [one.prompt_token_ids for one in usual])
    for own, *outputs in zip(EXPERTS, first, again):
        with replaying(reference, own):
            check_tokens(reference, outputs)
        assert all(one.num_cached_tokens == 0 for one in outputs)
        for taken in (one.routed_experts for one in outputs if one.routed_experts is not None):
            assert np.array_equal(taken[: len(own)][own >= 0], own[own >= 0])
    assert sum(one.token_ids != other.token_ids for one, other in zip(first, plain)) >= 3


def check_tokens(reference: Reference, outputs: Sequence[RequestOutput]) -> None:
    """Assert that tokens are the oracle's choices, and as probable as it says."""
    for output in outputs:
        start, tokens = len(output.prompt_token_ids), (*output.prompt_token_ids, *output.token_ids)
        with torch.inference_mode():
            logits = reference.model(torch.tensor([tokens]), use_cache=False).logits[0]
        logprobs = logits.log_softmax(-1)
        assert not [*near_ties(output.token_ids, logprobs[start - 1 : -1])]
        check_logprobs(output, logprobs[start - 1 : -1], logprobs[: start - 1])


def test_experts_of_the_same_tokens_change_nothing(drafted_of: Callable[[str], Drafted]) -> None:
    with engine_of(drafted_of("agreeing"), 0, 2, **FIELDS) as engine:
        told = engine.generate(PROMPTS, TOLD)
        same = engine.generate(bring([routed(one) for one in told]), TOLD)
    for one, other in zip(told, same):
        assert other.token_ids == one.token_ids
        assert np.array_equal(routed(other), routed(one))


def routed(output: RequestOutput) -> RoutedExperts:
    assert output.routed_experts is not None
    return output.routed_experts


def test_what_can_not_be_replayed_is_refused(reference_of: Callable[[str], Reference]) -> None:
    path = str(reference_of("qwen").path)
    good = altered((4, 2, 2), 1)
    wrong: list[tuple[object, str]] = [
        (good[:, :1], r"\(4, 1, 2\) is not allowed; shape \(n, 2, 2\), n in 1..13"),
        (altered((14, 2, 2), 1), "n in 1..13"),
        (good[:0], "n in 1..13"),
        (good.astype(np.float32), "an array of integers"),
        ([[1], [2, 3]], "an array of integers"),
        (np.where(good == good.max(), 8, good), r"\[8\] is not allowed; expert ids in 0..7"),
        (np.full((1, 2, 2), -2), "expert ids in 0..7, or -1 in all places"),
        (np.array([[[1, 2], [3, -1]]]), "or -1 in all places of a token's layer"),
        (np.array([[[1, 2], [3, 3]]]), "each expert once"),
    ]
    config = EngineConfig(path, launcher="thread", enable_return_routed_experts=True)
    with Engine(config) as engine:
        for experts, message in wrong:
            prompt: Any = TokensPrompt([1, 2], replay_routed_experts=experts)  # type: ignore[arg-type]
            with pytest.raises(ValueError, match=rf"replay_routed_experts: .*{message}"):
                engine.generate([prompt], TOLD)
        prompt = TokensPrompt([1, 2], replay_routed_experts=good)
        with pytest.raises(ValueError, match="truncate_prompt_tokens: 1 is not allowed"):
            engine.generate([prompt], replace(TOLD, truncate_prompt_tokens=1))
        assert len(engine.generate([prompt], TOLD)[0].token_ids) == 12
    with (
        Engine(replace(config, enable_return_routed_experts=False)) as off,
        pytest.raises(ValueError, match="None unless the engine has enable_return_routed_experts"),
    ):
        off.generate([prompt], SamplingParams())
