"""The length of drafts that all ranks choose alike from agreed sums."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.parallel.agreement import StepTotals
from dp_runtime.speculative.adaptive_length import (
    LATE_STEPS,
    REVIEW_STEPS,
    AdaptiveLength,
    acceptance,
    mean_accepted,
)

NUM_PROGRAMS = 7


def accepted_of(random: np.random.Generator, p: float, num: int, num_drafts: int) -> int:
    """Drafts accepted in that many verifications, if each one is with chance p."""
    hits = random.random((num, num_drafts)) < p
    return int(hits.cumprod(axis=1).sum())


def programs(
    policy: AdaptiveLength, p: float, steps: int, *, start: int = 2, num: int = 64, delay: int = 2
) -> Iterator[int]:
    """What runs step by step; the sums of a step are agreed on `delay` steps after it."""
    random, program, under_way = np.random.default_rng(5), start, [(0, 0)] * delay
    for _ in range(steps):
        proposed, accepted = under_way.pop(0)
        under_way.append((num * (program + 1), accepted_of(random, p, num, program + 1)))
        yield program
        program = policy(StepTotals(program, proposed, accepted))


def best_length(p: float, cost: float) -> int:
    lengths = range(1, NUM_PROGRAMS + 1)
    return max(lengths, key=lambda s: sum(p**i for i in range(s + 1)) / (1 + s * cost))


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.77, 1.0])
def test_acceptance_is_what_gives_the_mean(p: float, num_drafts: int) -> None:
    mean = mean_accepted(p, num_drafts)
    assert mean == pytest.approx(sum(p**i for i in range(1, num_drafts + 1)))
    assert acceptance(mean, num_drafts) == pytest.approx(p, abs=1e-6)


@pytest.mark.parametrize("start", [0, 2, NUM_PROGRAMS - 1])
@pytest.mark.parametrize(("p", "length"), [(0.0, 1), (0.05, 1), (0.99, 7), (1.0, 7)])
def test_the_ends(p: float, length: int, start: int) -> None:
    ran = list(programs(AdaptiveLength(NUM_PROGRAMS), p, 200, start=start))
    assert set(ran[150:]) == {length - 1}


@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("cost", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("p", [0.3, 0.6, 0.8, 0.9])
def test_between_them_it_finds_what_is_almost_best(p: float, cost: float, delay: int) -> None:
    ran = list(programs(AdaptiveLength(NUM_PROGRAMS, cost), p, 300, delay=delay))

    def rate(length: int) -> float:
        return sum(p**i for i in range(length + 1)) / (1 + length * cost)

    assert rate(ran[-1] + 1) > 0.96 * rate(best_length(p, cost))


@pytest.mark.parametrize("num", [4, 64])
def test_it_does_not_flap(num: int) -> None:
    """Over the acceptances where one length gives way to the next."""
    for p in np.linspace(0.05, 0.95, 10):
        ran = list(programs(AdaptiveLength(NUM_PROGRAMS), float(p), 1600, num=num))
        changes = sum(one != two for one, two in pairwise(ran[400:]))
        assert changes <= 1200 // 200, f"{changes} changes at {p}"


def test_it_follows_a_change() -> None:
    policy = AdaptiveLength(NUM_PROGRAMS)
    before = list(programs(policy, 0.95, 300))[-1]
    after = list(programs(policy, 0.1, 300, start=before))[-1]
    assert (before, after) == (6, 0)


STEPS = st.lists(
    st.tuples(st.integers(0, 300), st.floats(0, 1)), min_size=REVIEW_STEPS, max_size=200
)


@settings(max_examples=50, deadline=None)
@given(steps=STEPS, data=st.data())
def test_ranks_agree_and_idle_steps_change_nothing(
    steps: list[tuple[int, float]], data: st.DataObject
) -> None:
    """One of two instances also sees steps without drafts, except right after a change."""
    one, two = AdaptiveLength(NUM_PROGRAMS), AdaptiveLength(NUM_PROGRAMS)
    program, late = 3, 0
    for num, share in steps:
        proposed = num * (program + 1)
        totals = StepTotals(program, proposed, int(proposed * share))
        following = one(totals)
        assert two(totals) == following
        assert 0 <= following < NUM_PROGRAMS
        late = LATE_STEPS if following != program else max(0, late - 1)
        program = following
        if not late and data.draw(st.booleans()):
            assert two(StepTotals(program, 0, 0)) == program


def test_sums_of_steps_before_a_change_are_left_out() -> None:
    """Two instances that change alike, and then hear of other steps before the change."""
    kept = []
    for share in (0.0, 1.0):
        policy, program, steps = AdaptiveLength(NUM_PROGRAMS), 0, 0
        while program == 0:
            program = policy(StepTotals(0, 10, 9))
        for _ in range(LATE_STEPS):
            assert policy(StepTotals(program, 10_000, int(share * 10_000))) == program
        while (following := policy(StepTotals(program, 700, 90))) == program:
            steps += 1
        kept.append((program, following, steps))
    assert kept[0] == kept[1]


def test_nothing_proposed_keeps_any_program() -> None:
    policy = AdaptiveLength(3)
    assert [policy(StepTotals(1, 0, 0)) for _ in range(100)] == [1] * 100


def test_one_program_is_kept() -> None:
    assert set(programs(AdaptiveLength(1), 0.7, 100, start=0)) == {0}


def test_arguments_are_checked() -> None:
    for cost in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="cost"):
            AdaptiveLength(3, cost)
    with pytest.raises(AssertionError, match="program 3 of 3"):
        AdaptiveLength(3)(StepTotals(3, 0, 0))
