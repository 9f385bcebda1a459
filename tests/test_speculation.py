"""Serving with drafts against transformers and against serving without, over ranks as threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from dp_runtime import Engine
from tests.product_cases import covering_rows
from tests.reference import Reference
from tests.serving import check_load
from tests.speculative_cases import (
    DRAFTED,
    SPECULATIVE_DIMENSIONS,
    SPECULATIVE_PAIRS,
    Drafted,
    SpeculativeCase,
)

DraftedOf = Callable[[str], tuple[Drafted, Reference]]


@pytest.fixture(scope="module")
def drafted_of(tmp_path_factory: pytest.TempPathFactory) -> DraftedOf:
    """A checkpoint of DRAFTED and its oracle, made at its first use."""

    @cache
    def make(name: str) -> tuple[Drafted, Reference]:
        drafted = DRAFTED[name](tmp_path_factory.mktemp(name))
        return drafted, Reference(drafted.model)

    return make


def check_case(case: SpeculativeCase, drafted: Drafted, reference: Reference) -> None:
    with Engine(case.config_of(drafted)) as engine:
        check_load(engine, reference, case.items, case.extra)
        report = engine.report()
        assert report.verifications > 0
        if case.preempts:
            assert report.preemptions > 0


CASES = [SpeculativeCase(**row) for row in covering_rows(SPECULATIVE_DIMENSIONS, SPECULATIVE_PAIRS)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_greedy_output_is_that_of_the_target(case: SpeculativeCase, drafted_of: DraftedOf) -> None:
    check_case(case, *drafted_of(case.checkpoint))
