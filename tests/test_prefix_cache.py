"""Tokens are the same with the prefix cache as without, whatever is shared, over thread ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime import Engine, RequestOutput, SamplingParams
from dp_runtime.core.request import Prompt, TokensPrompt
from dp_runtime.runner.step_loop import StepLoop
from tests.product_cases import random_prompt
from tests.serving import check_pages_free, loops_of, pools_of
from tests.speculative_cases import Drafted, engine_of

DraftedOf = Callable[[str], Drafted]
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=12)
POISON = 1e3  # beside keys and values around 1; NaN would spoil whoever gets the page next
SYSTEM = random_prompt(21, "system")


class Canary:
    """Poisons pages that leave a rank's cache, and shows that those in it are never written."""

    def __init__(self, loop: StepLoop, pools: Sequence[Tensor]) -> None:
        self._scheduler, self._pools = loop.scheduler, pools
        self._kept: dict[int, list[Tensor]] = {}
        self._launch = loop._launch
        vars(loop)["_launch"] = self.launch

    def launch(self, *arguments: Any) -> None:
        cache = self._scheduler.page_table.allocator.cache
        cached = {page for page in range(self._scheduler.pages.num_pages) if page in cache}
        for page in self._kept.keys() - cached:
            del self._kept[page]
            for pool in self._pools:
                pool[page] = POISON
        for page in cached:
            now = [pool[page].clone() for pool in self._pools]
            before = self._kept.setdefault(page, now)
            assert all(map(torch.equal, before, now)), f"cached page {page} was written"
        self._launch(*arguments)


@contextmanager
def watched(engine: Engine) -> Iterator[Engine]:
    with engine:
        for rank in zip(loops_of(engine), pools_of(engine), strict=True):
            Canary(*rank)
        yield engine
        check_pages_free(engine)


def converse(engine: Engine) -> list[RequestOutput]:
    """Serve three turns of chats that have a system prompt in common, and forks of each turn."""
    outputs: list[RequestOutput] = []
    chats = [[*SYSTEM, *random_prompt(length, f"user {length}")] for length in (3, 9, 18)]
    for turn in range(3):
        forks: list[Prompt] = [chat for chat in chats for _ in range(2)]
        params = [
            replace(GREEDY, seed=at, temperature=0.8 * (at % 2), max_tokens=6 + at % 4)
            for at in range(len(forks))
        ]
        params[turn] = replace(params[turn], prompt_logprobs=2)
        abandoned = [engine.submit(chat, replace(GREEDY, max_tokens=40)) for chat in chats[:2]]
        done = engine.generate(forks, params)
        for handle in abandoned:
            handle.abort()
        outputs += done
        for at, chat in enumerate(chats):
            chat += [*done[2 * at].token_ids, *random_prompt(4 + turn, f"turn {turn} {at}")]
    return outputs


def check_alike(outputs: Sequence[RequestOutput], expected: Sequence[RequestOutput]) -> None:
    for one, other in zip(outputs, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert (one.prompt_logprobs is None) == (other.prompt_logprobs is None)
        for mine, due in zip(one.prompt_logprobs or (), other.prompt_logprobs or (), strict=True):
            assert mine.token_id == due.token_id
            assert mine.logprob == pytest.approx(due.logprob, abs=1e-4)


SLOW = (
    "plain", "two ranks, overlap", "four ranks, ragged", "few pages", "mtp", "eagle3, overlap",
)  # fmt: skip
FEW = {"page_size": 4, "num_pages": 34, "dp_size": 1}
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "plain": ("mtp", 0, {"page_size": 4, "dp_size": 1}),
    "two ranks, overlap": ("mtp", 0, {"page_size": 8, "dp_size": 2, "overlap": True}),
    "four ranks, ragged": ("mtp", 0, {"page_size": 4, "dp_size": 4, "padding": "ragged"}),
    "few pages": ("mtp", 0, FEW | {"max_num_tokens": 40}),
    "few pages, overlap": ("mtp", 0, FEW | {"overlap": True}),
    "mtp": ("agreeing", 3, {"page_size": 4, "dp_size": 1}),
    "mtp, few pages": ("agreeing", 3, FEW | {"max_num_tokens": 64}),
    "mtp, three ranks, overlap": ("agreeing", 4, {"page_size": 8, "dp_size": 3, "overlap": True}),
    "eagle3, overlap": ("eagle3", 2, {"page_size": 4, "overlap": True}),
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind in SLOW)) for kind in CASES]
)
def test_tokens_are_those_without_the_cache(kind: str, drafted_of: DraftedOf) -> None:
    checkpoint, num_steps, fields = CASES[kind]
    drafted, limits = drafted_of(checkpoint), {"max_model_len": 128, "max_num_requests": 8}
    with engine_of(drafted, num_steps, prefix_caching=False, **limits, **fields) as engine:
        expected = converse(engine)
        assert not any(one.num_cached_tokens for one in expected)
    with watched(engine_of(drafted, num_steps, **limits, **fields)) as engine:
        outputs = converse(engine)
        report = engine.report()
    check_alike(outputs, expected)
    counts = report.prefixes
    assert sum(one.hits for one in counts) > 100
    assert any(one.num_cached_tokens > len(SYSTEM) for one in outputs)
    if "num_pages" in fields:
        assert sum(one.evictions for one in counts) > 0
        assert report.preemptions > 0


def test_embeddings_are_found_where_they_are_the_same(drafted_of: DraftedOf) -> None:
    ids, values = random_prompt(30, "embedded"), np.ones((3, 64), np.float32)
    others = values * np.array([[1.0], [1.0], [-1.0]], np.float32)
    embedded = [TokensPrompt(ids, each, (2, 9, 17)) for each in (values, values, others)]
    prompts: list[Prompt] = [ids, *embedded]
    fields: dict[str, Any] = {"page_size": 8, "dp_size": 1}
    with engine_of(drafted_of("mtp"), 0, prefix_caching=False, **fields) as engine:
        expected = [engine.generate([prompt], GREEDY)[0] for prompt in prompts]
    with watched(engine_of(drafted_of("mtp"), 0, **fields)) as engine:
        outputs = [engine.generate([prompt], GREEDY)[0] for prompt in prompts]
    check_alike(outputs, expected)
    assert [one.num_cached_tokens for one in outputs] == [0, 0, 24, 16]


@pytest.mark.parametrize("overlap", [False, True])
def test_samples_of_a_prompt_compute_it_once(drafted_of: DraftedOf, overlap: bool) -> None:
    prompt, params = random_prompt(290, "samples"), replace(GREEDY, max_tokens=3)
    limits = {"max_model_len": 300, "max_num_requests": 8, "max_num_tokens": 2048}
    fields = {"page_size": 8, "dp_size": 1, "overlap": overlap} | limits
    with watched(engine_of(drafted_of("mtp"), 0, **fields)) as engine:
        outputs = engine.generate([prompt] * 8, params)
    assert len({one.token_ids for one in outputs}) == 1
    assert sorted(one.num_cached_tokens for one in outputs) == [0] + [288] * 7


def test_pages_of_eight_bits_are_shared_like_others(drafted_of: DraftedOf) -> None:
    fields: dict[str, Any] = {"page_size": 4, "dp_size": 1, "kv_cache_dtype": "fp8_e4m3"}
    with engine_of(drafted_of("mtp"), 0, prefix_caching=False, **fields) as engine:
        expected = converse(engine)
    with engine_of(drafted_of("mtp"), 0, **fields) as engine:
        outputs = converse(engine)
        assert sum(one.hits for one in engine.report().prefixes) > 100
    assert [one.token_ids for one in outputs] == [one.token_ids for one in expected]


def drafts_of(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    """How many drafts of each prompt's output were accepted, one prompt after the other."""
    histograms = []
    for prompt in prompts:
        before = engine.report().accepted_histogram or (0,) * 4
        engine.generate([prompt], GREEDY)
        after = engine.report().accepted_histogram
        histograms.append(tuple(two - one for one, two in zip(before, after)))
    return histograms


def test_drafts_are_those_without_the_cache(drafted_of: DraftedOf) -> None:
    """Also where prompts part right behind a page: its last draft row reads the next token."""
    page = random_prompt(16, "a page")
    prompts = [[*page, 5, 6], [*page, 7, 8], [*page, 5, 6, 9], [*page, *page, 3], [*page, *page, 4]]
    fields = {"page_size": 8, "dp_size": 1}
    with engine_of(drafted_of("agreeing"), 3, prefix_caching=False, **fields) as engine:
        expected = drafts_of(engine, prompts)
    with watched(engine_of(drafted_of("agreeing"), 3, **fields)) as engine:
        assert drafts_of(engine, prompts) == expected
        hits = sum(one.hits for one in engine.report().prefixes)
    assert hits == 8 + 16 + 8 + 24, "a page that another token follows is another page"


def test_survivors_keep_their_caches_and_tokens_are_the_same(drafted_of: DraftedOf) -> None:
    fields = {"page_size": 4, "overlap": True}
    drafted = drafted_of("mtp")
    with engine_of(drafted, 0, prefix_caching=False, **fields) as engine:
        expected = converse(engine)
    faulty = engine_of(drafted, 0, inject="rank=1,step=30,kind=raise", **fields)
    with faulty as engine:
        outputs = converse(engine)
        assert engine._core.health(5.0)[0].epoch > 0, "a rank was lost"
        assert sum(one.hits for one in engine.report().prefixes) > 100
        check_pages_free(engine)
    check_alike(outputs, expected)
