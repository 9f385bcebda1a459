"""What becomes of a prompt's length and of max_tokens before a rank gets them."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from dp_runtime import SamplingParams
from dp_runtime.core.request import RankRequest, TokensPrompt
from dp_runtime.engine.inputs import RequestFactory
from dp_runtime.engine.prompts.context_length import check_room
from tests.dp_runtime.engine.fake_group import MAX_MODEL_LEN, MODEL, FakeGroup

ROOM = MAX_MODEL_LEN - 1


def made(prompt: Any, **params: Any) -> RankRequest:
    factory = RequestFactory(MODEL, None, seed=0, ranks=FakeGroup(1))
    return factory.make(prompt, SamplingParams(**params), None).request


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({}, 40), ({"truncate_prompt_tokens": 40}, 40), ({"truncate_prompt_tokens": 1000}, 40),
        ({"truncate_prompt_tokens": 7}, 7), ({"truncate_prompt_tokens": 1}, 1),
        ({"truncate_prompt_tokens": -1}, 40),
        ({"truncate_prompt_tokens": -1, "max_tokens": MAX_MODEL_LEN - 30}, 30),
    ],
    ids=str,
)  # fmt: skip
def test_the_last_tokens_of_a_prompt_are_kept(params: dict[str, Any], kept: int) -> None:
    prompt = tuple(range(40))
    request = made(list(prompt), **params)
    assert request.prompt_token_ids == prompt[-kept:]
    assert request.num_reserved_tokens == kept + request.params.known_max_tokens


def test_a_prompt_that_is_too_long_fits_once_it_is_truncated() -> None:
    prompt = [1] * (3 * MAX_MODEL_LEN)
    assert len(made(prompt, truncate_prompt_tokens=-1).prompt_token_ids) == MAX_MODEL_LEN - 16
    assert len(made(prompt, truncate_prompt_tokens=-1, max_tokens=None).prompt_token_ids) == ROOM
    assert len(made(prompt, truncate_prompt_tokens=ROOM).prompt_token_ids) == ROOM
    with pytest.raises(ValueError, match=f"prompt: '{MAX_MODEL_LEN} tokens' is not allowed"):
        made(prompt, truncate_prompt_tokens=MAX_MODEL_LEN)
    with pytest.raises(ValueError, match="max_tokens: 64 is not allowed; less than max_model_len"):
        made(prompt, truncate_prompt_tokens=-1, max_tokens=MAX_MODEL_LEN)


def test_prompt_embeds_are_not_truncated() -> None:
    embeds = TokensPrompt([1, 2, 3], np.zeros((1, MODEL.hidden_size), np.float32), [1])
    with pytest.raises(ValueError, match=r"truncate_prompt_tokens: 2 .*; None with prompt_embeds"):
        made(embeds, truncate_prompt_tokens=2)
    assert made(TokensPrompt([1, 2, 3]), truncate_prompt_tokens=2).prompt_token_ids == (2, 3)


def test_max_tokens_of_none_are_as_many_as_fit() -> None:
    request = made([1] * 20, max_tokens=None, min_tokens=40, temperature=0.5)
    assert request.params == SamplingParams(max_tokens=44, min_tokens=40, temperature=0.5)
    assert request.num_reserved_tokens == MAX_MODEL_LEN
    assert made([1] * ROOM, max_tokens=None).params.max_tokens == 1
    with pytest.raises(ValueError, match="min_tokens: 45 is not allowed; at most max_tokens 44"):
        made([1] * 20, max_tokens=None, min_tokens=45)
    assert made([1] * 20, max_tokens=1000).params.max_tokens == 1000, "a rank cuts it"


# As NVIDIA's NeMo-Skills looks for it, to ask for less and try again.
PARSED = re.compile(
    r"maximum context length is (\d+) tokens.*?request has (\d+) input tokens", re.IGNORECASE
)


def test_what_is_too_long_is_said_in_the_words_that_clients_parse() -> None:
    with pytest.raises(ValueError, match="prompt: '100 tokens'") as caught:
        made([1] * 100)
    found = PARSED.search(str(caught.value))
    assert found is not None
    assert found.groups() == (f"{MAX_MODEL_LEN}", "100")
    check_room(made([1] * 20, max_tokens=44), MAX_MODEL_LEN)
    with pytest.raises(ValueError, match=r"max_tokens: 45 .* 20 input tokens") as caught:
        check_room(made([1] * 20, max_tokens=45), MAX_MODEL_LEN)
    assert str(caught.value).endswith(f"(45 > {MAX_MODEL_LEN} - 20)")
    found = PARSED.search(str(caught.value))
    assert found is not None
    assert found.groups() == (f"{MAX_MODEL_LEN}", "20")
