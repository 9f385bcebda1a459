"""Policies of the user's own: what they say is checked on every rank."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from dp_runtime.engine.routing.load_balancer import Demand
from dp_runtime.engine.routing.own_routing import OwnRouting
from dp_runtime.errors import PolicyFailed
from dp_runtime.parallel.agreement import StepTotals
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.policies.own_policies import (
    DraftTotals,
    OwnBudget,
    OwnDraftLength,
    OwnPadding,
)
from dp_runtime.parallel.prefill_budget import StepLoad
from examples.experiments.my_policy import OneMoreOrLess


class Says:
    """Any policy, which always says the same and remembers what it was asked."""

    def __init__(self, said: Any) -> None:
        self.said, self.asked = said, list[Any]()

    def __getattr__(self, name: str) -> Any:
        def say(asked: Any) -> Any:
            self.asked.append(asked)
            return self.said

        return say


def test_what_policies_say_is_done() -> None:
    policy = Says([4, 4])
    assert OwnPadding(policy, 8).plan((3, 0)) == PaddingPlan((3, 0), (4, 4))
    assert OwnPadding(policy, 8).plan((0, 0)) == PaddingPlan((0, 0), (0, 0)), "no forward runs"
    assert policy.asked == [(3, 0)]
    load = StepLoad(5, 2, 900)
    assert OwnBudget(Says(7), 16)(load) == 7
    assert OwnBudget(Says(None), 16)(load) is None
    draft = Says(3)
    assert OwnDraftLength(draft, 4)(StepTotals(1, 10, 6)) == 2
    assert draft.asked == [DraftTotals(2, 4, 10, 6)]


def test_the_example_drafts_more_while_most_are_accepted() -> None:
    lengths = []
    for num_drafts, accepted in ((1, 4), (2, 3), (3, 8), (3, 0), (1, 0)):
        lengths.append(OneMoreOrLess().draft_length(DraftTotals(num_drafts, 3, 6, accepted)))
    assert lengths == [2, 1, 3, 2, 1]
    assert OneMoreOrLess().draft_length(DraftTotals(2, 3, 0, 0)) == 2


@pytest.mark.parametrize("said", [[4], [2, 4], [3, 9], [3, "x"], [3, 3.0], [True, 3]])
def test_padding_is_refused_that_ranks_could_not_gather(said: Any) -> None:
    with pytest.raises(PolicyFailed, match=r"gathered_rows: .*for real_rows \(3, 1\) a number for"):
        OwnPadding(Says(said), 8).plan((3, 1))


class Wrong:
    """Fails as code does that somebody is still writing."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def gathered_rows(self, real_rows: tuple[int, ...]) -> list[int]:
        raise self.error

    def prefill_budget(self, load: StepLoad) -> int | None:
        raise self.error

    def draft_length(self, totals: DraftTotals) -> int:
        raise self.error

    def choose(self, ranks: Any, demand: Any) -> int:
        raise self.error


class Panic(BaseException):
    """As libraries in Rust raise."""


@pytest.mark.parametrize("error", [KeyError("boom"), SystemExit(3), ValueError("x"), Panic("y")])
def test_what_a_policy_raises_is_its_own_error(error: BaseException) -> None:
    policy = Wrong(error)
    calls: dict[str, Callable[[], Any]] = {
        "padding": lambda: OwnPadding(policy, 8).plan((3, 1)),
        "prefill_budget": lambda: OwnBudget(policy, 16)(StepLoad(0, 0, 0)),
        "speculative_draft_length": lambda: OwnDraftLength(policy, 4)(StepTotals(0, 0, 0)),
        "routing": lambda: OwnRouting(policy).choose({}, Demand(1)),
    }
    for field, call in calls.items():
        text = f"{field}: Wrong: {type(error).__name__}: {error} ({__file__}, line "
        with pytest.raises(PolicyFailed, match=re.escape(text)):
            call()


def test_an_interrupt_is_no_policy_s() -> None:
    with pytest.raises(KeyboardInterrupt):
        OwnPadding(Wrong(KeyboardInterrupt()), 8).plan((3, 1))


@pytest.mark.parametrize("said", [0, 17, -1, 2.0, "8"])
def test_a_budget_is_refused_that_no_step_has(said: Any) -> None:
    with pytest.raises(PolicyFailed, match=r"prefill_budget: .*None or prompt tokens, 1..16"):
        OwnBudget(Says(said), 16)(StepLoad(0, 0, 0))


@pytest.mark.parametrize("said", [0, 5, None])
def test_a_draft_length_is_refused_that_no_program_has(said: Any) -> None:
    with pytest.raises(PolicyFailed, match=r"draft_length: .* is not allowed; 1..4"):
        OwnDraftLength(Says(said), 4)(StepTotals(0, 0, 0))
