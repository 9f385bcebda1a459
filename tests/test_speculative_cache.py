"""Keys and values of rejected drafts are never attended, and their pages are used again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dp_runtime import SamplingParams
from dp_runtime.core.request import RequestUpdate
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_tracing import InflightStep
from tests.product_cases import random_prompt
from tests.serving import check_pages_free, loops_of, pools_of
from tests.speculative_cases import Drafted, engine_of

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=16)
PROMPTS = [random_prompt(length, "kept") for length in (1, 33, 50, 40, 27)]
GARBAGE = 1e3  # beside keys and values around 1

DraftedOf = Callable[[str], Drafted]


class Spoiler:
    """Overwrites, after every commit, what a rank's caches hold behind its requests' tokens.

    kept: tokens of a request that are spared, on top of those that count as computed.
    """

    def __init__(self, loop: StepLoop, pools: Sequence[Tensor], kept: int = 0) -> None:
        self.owners: dict[int, set[int]] = defaultdict(set)  # requests by the page they held
        self._scheduler, self._pools, self._kept = loop.scheduler, pools, kept
        self._draw = torch.Generator().manual_seed(0)
        self._commit = loop.commit
        loop.commit = self.commit  # type: ignore[method-assign]

    def commit(self, step: InflightStep) -> list[RequestUpdate]:
        progress = self._commit(step)
        self._scheduler.check()
        dead = self.dead()
        for pool in self._pools:
            garbage = GARBAGE * torch.randn(pool.shape, generator=self._draw)
            pool.copy_(torch.where(dead[:, None, None, :, None], garbage, pool))
        return progress

    def dead(self) -> Tensor:
        """[num_pages, page_size] bool: free pages are, too, unless they are cached."""
        table, pages = self._scheduler.table, self._scheduler.pages
        cache = self._scheduler.page_table.allocator.cache
        dead = torch.ones(pages.num_pages, pages.page_size, dtype=torch.bool)
        dead[[page for page in range(pages.num_pages) if page in cache]] = False
        for row in self._scheduler.running.tolist():
            held = self._scheduler.page_table.pages(row)
            positions = torch.arange(len(held) * pages.page_size).view(-1, pages.page_size)
            dead[held] = positions >= int(table.num_computed_tokens[row]) + self._kept
            for page in held:
                self.owners[page].add(int(table.request_ids[row]))
        return dead


CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "agreeing": ("agreeing", 3, {"page_size": 4}),
    "few pages": ("agreeing", 7, {"page_size": 4, "num_pages": 35, "max_num_tokens": 70}),
    "overlap": ("agreeing", 4, {"page_size": 4, "overlap": True}),
    "adaptive": ("agreeing", 5, {"page_size": 16, "speculative_adaptive": True, "dp_size": 3}),
    "eagle3": ("eagle3", 6, {"page_size": 16, "overlap": True, "padding": "ragged"}),
}


@pytest.mark.parametrize("kind", CASES)
def test_nothing_behind_the_accepted_tokens_is_attended(kind: str, drafted_of: DraftedOf) -> None:
    checkpoint, num_steps, fields = CASES[kind]
    drafted = drafted_of(checkpoint)
    # So long that requests run side by side, and preempt, however their arrivals are spread.
    params = replace(GREEDY, max_tokens=40) if kind == "few pages" else GREEDY
    with engine_of(drafted, num_steps, **fields) as engine:
        expected = engine.generate(PROMPTS, params)
        before = engine.report()
    with engine_of(drafted, num_steps, **fields) as engine:
        spoilers = [Spoiler(*rank) for rank in zip(loops_of(engine), pools_of(engine))]
        outputs = engine.generate(PROMPTS, params)
        report = engine.report()
        check_pages_free(engine)
    assert [one.token_ids for one in outputs] == [one.token_ids for one in expected]
    assert report.verifications > 0
    # A request's drafts, too, are what they were; a preemption only shifts where they begin.
    preempted = report.preemptions or before.preemptions
    if not preempted and "speculative_adaptive" not in fields:
        assert report.accepted_histogram == before.accepted_histogram
    assert (report.preemptions > 0) == (kind == "few pages")
    if kind == "few pages":
        assert max(len(owners) for one in spoilers for owners in one.owners.values()) > 1


@pytest.mark.parametrize("layers", ["target", "draft"])
def test_the_last_accepted_token_is_attended(layers: str, drafted_of: DraftedOf) -> None:
    """Otherwise the test above would show nothing."""
    drafted = drafted_of("agreeing")
    with engine_of(drafted, 3, 1) as engine:
        expected = engine.generate(PROMPTS, GREEDY)
        histogram = engine.report().accepted_histogram
    with engine_of(drafted, 3, 1) as engine:
        ((*target, draft),) = pools_of(engine)
        (loop,) = loops_of(engine)
        Spoiler(loop, target if layers == "target" else [draft], kept=-1)
        outputs = engine.generate(PROMPTS, GREEDY)
        spoiled = engine.report().accepted_histogram
    same = [one.token_ids for one in outputs] == [one.token_ids for one in expected]
    assert same == (layers == "draft")
    assert spoiled != histogram
