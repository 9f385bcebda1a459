"""Workloads: the same for everyone, with the rates, lengths and ranks that were asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.experiments.workload.conversations import Conversation
from dp_runtime.experiments.workload.skew import apportion
from dp_runtime.experiments.workload.workload import read_workload

ARRIVALS: list[dict[str, Any]] = [
    {"kind": "all_at_once"},
    {"kind": "poisson", "rate": 20.0},
    {"kind": "gamma", "rate": 20.0, "cv": 3},
]
LENGTHS: list[dict[str, Any]] = [
    {"kind": "fixed", "tokens": 7},
    {"kind": "log_uniform", "shortest": 3, "longest": 90},
]
SKEWS: list[dict[str, Any]] = [
    {"kind": "routed"},
    {"kind": "zipf", "exponent": 1.3},
    {"kind": "one_hot", "rank": 1, "share": 0.8},
    {"kind": "alternating", "period": 5, "share": 0.9},
]
TABLES = st.fixed_dictionaries(
    {
        "num_requests": st.integers(1, 20).map(lambda n: 3 * n),
        "turns": st.sampled_from([1, 3]),
        "seed": st.integers(0, 2**31 - 1),
        "arrivals": st.sampled_from(ARRIVALS),
        "prompts": st.sampled_from(LENGTHS),
        "outputs": st.sampled_from(LENGTHS),
        "skew": st.sampled_from(SKEWS),
    }
)


def made(dp_size: int = 4, **table: Any) -> tuple[Conversation, ...]:
    return read_workload(table).conversations(dp_size)


@settings(max_examples=25, deadline=None)
@given(TABLES)
def test_a_workload_is_a_pure_function_of_its_values(table: dict[str, Any]) -> None:
    one, other = (made(**table) for _ in range(2))
    assert one == other
    assert sum(len(each.turns) for each in one) == table["num_requests"]
    times = [each.at_s for each in one]
    assert times == sorted(times)
    assert times[0] >= 0
    for each in one:
        for turn in each.turns:
            assert len(turn.token_ids(300)) == turn.num_tokens >= 1
            assert turn.output_len >= 1
    assert one[0].turns[0].token_ids(300) == other[0].turns[0].token_ids(300)


def test_another_seed_is_another_workload_and_a_changed_part_moves_no_other() -> None:
    table: dict[str, Any] = {"num_requests": 40, "arrivals": {"kind": "poisson", "rate": 5}}
    before, reseeded = made(**table), made(**table, seed=1)
    assert [c.turns for c in before] != [c.turns for c in reseeded]
    skewed = made(**table, skew={"kind": "zipf"})
    assert [(c.at_s, c.turns) for c in before] == [(c.at_s, c.turns) for c in skewed]


@pytest.mark.parametrize(("kind", "cv"), [("poisson", 1.0), ("gamma", 0.3), ("gamma", 2.5)])
def test_arrivals_have_their_rate_and_spread(kind: str, cv: float) -> None:
    arrivals = {"kind": kind, "rate": 8.0} | ({"cv": cv} if kind == "gamma" else {})
    gaps = np.diff([each.at_s for each in made(num_requests=20_000, arrivals=arrivals)])
    assert gaps.mean() == pytest.approx(1 / 8, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)


def test_arrivals_of_a_file_begin_at_the_start_at_their_scaled_rate(tmp_path: Path) -> None:
    file = tmp_path / "times"
    file.write_text("10.5\n12.5\n11.5\n\n20\n")
    arrivals = {"kind": "trace", "path": str(file), "rate_scale": 2.0}
    assert [each.at_s for each in made(num_requests=3, arrivals=arrivals)] == [0, 0.5, 1]
    with pytest.raises(ValueError, match="a file of 5 times at least"):
        made(num_requests=5, arrivals=arrivals)


def test_lengths_of_a_file_are_drawn_from_it(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("tokens,other\n3,x\n5,y\n")
    prompts = {"kind": "empirical", "path": str(file), "column": "tokens"}
    lens = {each.prompt_lens[0] for each in made(num_requests=60, prompts=prompts)}
    assert lens == {3, 5}
    with pytest.raises(ValueError, match="column: 'size' is not allowed; one of tokens, other"):
        made(prompts=prompts | {"column": "size"})
    file.write_text("tokens\n3\nmany\n")
    with pytest.raises(ValueError, match=r"lengths.csv:3: 'many' is not allowed; a number"):
        made(prompts=prompts)


def test_half_of_log_uniform_lengths_are_below_the_geometric_mean() -> None:
    prompts = {"kind": "log_uniform", "shortest": 10, "longest": 1000}
    lens = np.array([c.prompt_lens[0] for c in made(num_requests=5000, prompts=prompts)])
    assert (lens.min() >= 10) & (lens.max() <= 1000)
    assert (lens < 100).mean() == pytest.approx(0.5, abs=0.05)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_shares_add_up_to_the_whole(count: int, weights: list[float]) -> None:
    weights[0] += 0.1
    shares = apportion(count, np.array(weights))
    exact = count * np.array(weights) / sum(weights)
    assert shares.sum() == count
    assert (abs(shares - exact) < 1).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 6), st.sampled_from(SKEWS[1:]))
def test_each_conversation_is_pinned_to_a_rank(count: int, dp_size: int, skew: Any) -> None:
    if skew["kind"] == "one_hot" and dp_size == 1:
        skew = skew | {"rank": 0}
    ranks = [each.dp_rank for each in made(dp_size, num_requests=count, skew=skew)]
    assert len(ranks) == count
    assert {*ranks} <= {*range(dp_size)}


def test_skews_have_the_numbers_that_they_name() -> None:
    def counts(count: int, skew: dict[str, Any]) -> list[int]:
        ranks = Counter(each.dp_rank for each in made(num_requests=count, skew=skew))
        return [ranks[rank] for rank in range(4)]

    assert counts(32, {"kind": "zipf", "exponent": 0}) == [8, 8, 8, 8]
    assert counts(25, {"kind": "zipf"}) == [12, 6, 4, 3]
    assert counts(40, {"kind": "one_hot", "rank": 2, "share": 0.7}) == [4, 4, 28, 4]
    assert counts(10, {"kind": "counts", "conversations": [1, 0, 9, 0]}) == [1, 0, 9, 0]
    alternating = {"kind": "alternating", "period": 8, "share": 1.0}
    hot = [each.dp_rank for each in made(num_requests=20, skew=alternating)]
    assert hot == [0] * 8 + [1] * 8 + [2] * 4


def test_system_prompts_are_shared_and_turns_go_on() -> None:
    shared = {"system_prompts": 2, "system_prompt_tokens": 6}
    prompts = {"kind": "fixed", "tokens": 3}
    conversations = made(
        num_requests=30, turns=3, think_s=0.5, prompts=prompts, outputs=prompts, **shared
    )
    heads = Counter(tuple(each.turns[0].token_ids(500)[:6]) for each in conversations)
    assert len(heads) == 2
    assert len({tuple(each.turns[0].token_ids(500)) for each in conversations}) == 10
    first = conversations[0]
    assert first.prompt_lens == (9, 15, 21)
    assert first.num_tokens == 24
    assert [turn.think_s for turn in first.turns] == [0, 0.5, 0.5]


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"requests": 3}, "^workload.requests: 3 is not allowed; known here: num_requests, turns"),
        ({"num_requests": 0}, "^workload.num_requests: 0 is not allowed; an integer >= 1"),
        ({"num_requests": 4, "turns": 3}, "^workload.num_requests: 4 .* a multiple of turns, 3"),
        ({"arrivals": "soon"}, "^workload.arrivals: 'soon' is not allowed; a table"),
        ({"arrivals": {"kind": "late"}}, "^workload.arrivals.kind: 'late' .* one of all_at_once"),
        ({"arrivals": {"kind": "poisson"}}, "^workload.arrivals.rate: None .* it is needed"),
        ({"prompts": {"kind": "fixed", "tokens": -1}}, "^workload.prompts.tokens: -1 is not"),
        ({"skew": {"kind": "zipf", "exponent": "x"}}, "^workload.skew.exponent: 'x' is not allow"),
        ({"skew": {"kind": "counts", "conversations": [1, -1]}}, "^workload.skew.conversations"),
        ({"system_prompts": 3}, "^workload.system_prompt_tokens: 0 is not allowed; above 0"),
        ({"kind": "sharegpt"}, "^workload.kind: 'sharegpt' is not allowed; one of drawn, moon"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_dotted_path(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_workload(table)


def test_a_skew_that_does_not_fit_the_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="2 numbers that add up to 4"):
        made(2, num_requests=4, skew={"kind": "counts", "conversations": [1, 2]})
    with pytest.raises(ValueError, match=r"rank: 5 is not allowed; a rank of 0..1"):
        made(2, num_requests=4, skew={"kind": "one_hot", "rank": 5})
