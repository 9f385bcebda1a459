"""The loads of the routing benchmark, and what one endless cache would have of them."""

from __future__ import annotations

from itertools import pairwise, takewhile
from operator import eq

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.benchmarks.prefix_routing import (
    BLOCK,
    LOADS,
    PAGE,
    Asked,
    Run,
    Turn,
    endless,
    figures,
    ideal_hit_rate,
)


def test_the_ideal_counts_pages_that_came_before() -> None:
    first, same, longer = Turn((1, 2), 4), Turn((1, 2), 4), Turn((1, 2, 3), 4)
    assert ideal_hit_rate([[first]], PAGE) == 0
    # Of 64 tokens 48 at most are cached: one is always computed, and with it its page.
    assert ideal_hit_rate([[first], [same]], PAGE) == pytest.approx(48 / 128)
    assert ideal_hit_rate([[first], [same]], 1) == pytest.approx(63 / 128)
    assert ideal_hit_rate([[first, longer]], PAGE) == pytest.approx(64 / (2 * BLOCK + 3 * BLOCK))
    assert ideal_hit_rate([[first], [Turn((2, 1), 4)]], PAGE) == 0


@given(st.lists(st.lists(st.integers(0, 2), max_size=12), max_size=8), st.integers(1, 4))
def test_an_endless_cache_has_the_longest_beginnings(prompts: list[list[int]], page: int) -> None:
    due = 0
    for number, prompt in enumerate(prompts):
        alike = (sum(takewhile(bool, map(eq, prompt, other))) for other in prompts[:number])
        due += min(max(alike, default=0), max(0, len(prompt) - 1)) // page * page
    assert endless(prompts, page) == due


@pytest.mark.parametrize("name", LOADS)
def test_loads_are_generated_alike_and_share_what_they_say(name: str) -> None:
    load = LOADS[name](np.random.default_rng(3), 32)
    assert load == LOADS[name](np.random.default_rng(3), 32)
    assert 0.4 < ideal_hit_rate(load, PAGE) <= ideal_hit_rate(load, 1) < 1
    for turns in load:
        for one, other in pairwise(turns):
            assert other.hash_ids[: len(one.hash_ids)] == one.hash_ids
            assert other.token_ids[: len(one.token_ids)] == one.token_ids


def test_figures_follow_their_definitions() -> None:
    asked = [
        Asked(range(100), 0, 0.5, 0.3, 2.0, 0),
        Asked(range(100), 60, 0.0, 0.1, 1.0, 0),
        Asked(range(200), 40, 0.6, 0.2, 2.0, 1),
    ]
    found = figures(Run(asked, wall_s=2.0, moved=3, queries=500, hits=100))
    assert (found["cached/prompt"], found["hits/queries"]) == (0.25, 0.2)
    assert found["routed"] == 96 / 400, "the first rank had the same prompt twice"
    assert (found["requests_s"], found["moved"]) == (1.5, 3)
    assert found["ttft_ms"] == pytest.approx(200)
    assert found["most"] == pytest.approx(2 / 3)
