"""The loads of the routing benchmark, and what one endless cache would have of them."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from examples.benchmarks.prefix_routing import BLOCK, LOADS, Asked, Turn, figures, ideal_hit_rate


def test_the_floor_counts_pages_that_came_before() -> None:
    first, same, longer = Turn((1, 2), 4), Turn((1, 2), 4), Turn((1, 2, 3), 4)
    assert ideal_hit_rate([[first]]) == 0
    # Of 64 tokens 48 at most are cached: one is always computed, and with it its page.
    assert ideal_hit_rate([[first], [same]]) == pytest.approx(48 / 128)
    assert ideal_hit_rate([[first, longer]]) == pytest.approx(64 / (2 * BLOCK + 3 * BLOCK))
    assert ideal_hit_rate([[first], [Turn((2, 1), 4)]]) == 0


@pytest.mark.parametrize("name", LOADS)
def test_loads_are_generated_alike_and_share_what_they_say(name: str) -> None:
    load = LOADS[name](np.random.default_rng(3), 32)
    assert load == LOADS[name](np.random.default_rng(3), 32)
    assert 0.4 < ideal_hit_rate(load) < 1
    for turns in load:
        for one, other in pairwise(turns):
            assert other.hash_ids[: len(one.hash_ids)] == one.hash_ids
            assert other.token_ids[: len(one.token_ids)] == one.token_ids


def test_figures_follow_their_definitions() -> None:
    asked = [Asked(100, 60, 0.1, 1.0, 0), Asked(100, 0, 0.3, 2.0, 0), Asked(200, 40, 0.2, 2.0, 1)]
    found = figures(asked, wall_s=2.0, moved=3, ideal=0.5)
    assert (found["hit_rate"], found["ratio"]) == (0.25, 0.5)
    assert (found["requests_s"], found["moved"]) == (1.5, 3)
    assert found["ttft_ms"] == pytest.approx(200)
    assert found["most"] == pytest.approx(2 / 3)
