"""Ranks that serve scripts of requests with drafts, and what each request gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest

from dp_runtime.core.step_program import MAX_DRAFTS
from tests.dp_runtime.speculative_ranks import Event, SpeculativeRanks
from tests.dp_runtime.speculative_scripts import (
    MAX_REQUESTS,
    MAX_TOKENS,
    MODEL_LEN,
    MORE,
    PAGE_SIZE,
    SHAPES,
    Alone,
    request_of,
)
from tests.speculative_cases import Drafted

RanksOf = Callable[[str, int], SpeculativeRanks]
AloneOf = Callable[[str], Sequence[Alone]]


@pytest.fixture(scope="module")
def ranks_of(drafted_of: Callable[[str], Drafted]) -> RanksOf:
    """So many ranks with a checkpoint of DRAFTED, loaded at their first use."""

    @cache
    def make(name: str, dp_size: int) -> SpeculativeRanks:
        drafted = drafted_of(name)
        return SpeculativeRanks(
            drafted.model, dp_size, **drafted.fields(MAX_DRAFTS), page_size=PAGE_SIZE,
            num_pages=1 + MAX_REQUESTS * -(-(MODEL_LEN + MAX_DRAFTS) // PAGE_SIZE),
            max_model_len=MODEL_LEN, max_num_requests=MAX_REQUESTS, max_num_tokens=MAX_TOKENS,
        )  # fmt: skip

    return make


@pytest.fixture(scope="module")
def alone_of(ranks_of: RanksOf) -> AloneOf:
    """Each request of SHAPES alone on one rank, which verifies after every single token.

    It accepts none of the drafts, so that it drafts after all of a text's prefixes.
    """

    @cache
    def make(name: str) -> list[Alone]:
        ranks, found = ranks_of(name, 1), []
        for shape in range(len(SHAPES)):
            request = request_of(shape, shape, MORE)
            served = ranks.serve(
                [Event(0, 0, request)], MAX_DRAFTS, num_requests=1, speculative_forced_tokens=1.0
            )
            chains = {one.num_known: one.drafts for one in served.verified[shape]}
            found.append(Alone(request.prompt_token_ids + served.outputs[shape], chains))
        return found

    return make
