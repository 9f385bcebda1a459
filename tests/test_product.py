"""The whole runtime against transformers, over ranks that are threads of this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dp_runtime import Engine
from tests.product_cases import (
    CHECKPOINTS,
    COUNTS,
    DIMENSIONS,
    GROUPS,
    WIDE_GROUPS,
    Case,
    combinations,
    covered,
    covering_rows,
    every,
)
from tests.reference import Reference
from tests.serving import check_load

CASES = [Case(**row) for row in covering_rows(DIMENSIONS, GROUPS)]
WIDE_CASES = [Case(**row) for row in covering_rows(DIMENSIONS, WIDE_GROUPS)]


def check_case(case: Case, reference: Reference) -> None:
    with Engine(case.config(str(reference.path))) as engine:
        check_load(engine, reference, case.items, case.extra)
        if case.preempts:
            assert engine.report().preemptions > 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product(case: Case, reference_of: Callable[[str], Reference]) -> None:
    check_case(case, reference_of(case.checkpoint))


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE_CASES, ids=str)
def test_wide_product(case: Case, reference_of: Callable[[str], Reference]) -> None:
    check_case(case, reference_of(case.checkpoint))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("dp_size", DIMENSIONS["dp_size"])
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_full_product(
    checkpoint: str, dp_size: int, reference_of: Callable[[str], Reference]
) -> None:
    """Every checkpoint at every dp_size, with every triple of values of all other dimensions.

    About 4,800 of the 518,400 points, which would take three days.
    """
    fixed: dict[str, Any] = {"checkpoint": checkpoint, "dp_size": dp_size}
    others = {name: choices for name, choices in DIMENSIONS.items() if name not in fixed}
    seed = list(CHECKPOINTS).index(checkpoint)
    for row in covering_rows(others, every(3, tuple(others)), seed):
        case = Case(**fixed, **row)
        print(case)  # the last one printed is the one that failed
        check_case(case, reference_of(checkpoint))


def test_cases_cover_all_pairs() -> None:
    pairs = combinations(DIMENSIONS, every(2, tuple(DIMENSIONS)))
    rows = [vars(case) for case in CASES]
    found = {key for row in rows for key in covered(row, every(2, tuple(DIMENSIONS)))}
    assert found == pairs.keys()
    assert 60 <= len(CASES) <= 100 <= len(WIDE_CASES) <= 200


def test_covering_rows_of_a_small_product() -> None:
    dimensions = {"a": (0, 1, 2), "b": "xyz", "c": (False, True)}
    rows = covering_rows(dimensions, every(2, "abc"))
    assert 9 <= len(rows) < 18
    assert {(row["a"], row["b"]) for row in rows} == {(a, b) for a in range(3) for b in "xyz"}
    assert len(covering_rows(dimensions, [("a", "b", "c")])) == 18


def test_loads_are_uneven() -> None:
    assert COUNTS["uneven"][4] == (10, 12, 12, 12)
    assert COUNTS["idle_ranks"][4] == (0, 12, 1, 0)
    lengths = {len(item.prompt) for item in Case(load="mixed", dp_size=4).items}
    assert {1, 600} <= lengths


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_outputs_vary(name: str, reference_of: Callable[[str], Reference]) -> None:
    """Otherwise equal tokens would show little."""
    reference = reference_of(name)
    case = Case(name, load="uneven")
    with Engine(case.config(str(reference.path))) as engine:
        outputs = check_load(engine, reference, case.items)
    tokens = [token for output in outputs for token in output.token_ids]
    assert len({output.token_ids for output in outputs}) == len(outputs)
    assert len(set(tokens)) > len(tokens) / 4
