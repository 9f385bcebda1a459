"""Padding modes, plans, and the two functions that pad and strip."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.parallel.padding import PaddingCost, PaddingMode, PaddingPlan, pad, strip

rank_rows = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(tuple)
modes = st.sampled_from([PaddingMode.MAX_LEN, PaddingMode.RAGGED])


@given(modes, rank_rows)
def test_a_plan_counts_real_and_gathered_rows(
    mode: PaddingMode, real_rows: tuple[int, ...]
) -> None:
    plan = PaddingPlan.for_mode(mode, real_rows)
    if mode is PaddingMode.MAX_LEN:
        assert set(plan.gathered_rows) == {max(real_rows)}
    else:
        assert plan.gathered_rows == real_rows
    assert plan.total_real == sum(real_rows)
    assert plan.wire_rows == plan.total_gathered * (len(real_rows) - 1)


@given(modes, rank_rows, st.booleans())
def test_the_real_index_finds_every_real_row_and_no_other(
    mode: PaddingMode, real_rows: tuple[int, ...], poison: bool
) -> None:
    gathered, expected = [], []
    for rank, count in enumerate(real_rows):
        plan = PaddingPlan.for_mode(mode, real_rows)
        rows = torch.full((count, 3), float(rank + 1))
        padded = pad(rows, plan, rank, poison)
        assert padded.shape == (plan.gathered_rows[rank], 3)
        assert torch.equal(strip(padded, plan, rank), rows)
        tail = padded[count:]
        assert tail.isnan().all() if poison else (tail == 0).all()
        gathered.append(padded)
        expected.append(rows)
    every = torch.cat(gathered)
    index = plan.real_index
    assert torch.equal(every if index is None else every[index], torch.cat(expected))


def test_pad_and_strip_refuse_rows_that_are_not_the_plan_s() -> None:
    plan = PaddingPlan.for_mode(PaddingMode.MAX_LEN, (10, 12, 12, 12))
    with pytest.raises(AssertionError, match="12 rows, the plan says 10"):
        pad(torch.zeros(12, 4), plan, 0)
    with pytest.raises(AssertionError, match="10 rows, the plan says 12"):
        strip(torch.zeros(10, 4), plan, 0)


def test_a_rank_can_not_gather_less_than_its_real_rows() -> None:
    with pytest.raises(AssertionError, match="at least its real rows"):
        PaddingPlan((3, 4), (3, 3))


@given(rank_rows)
def test_auto_takes_the_cheaper_mode(real_rows: tuple[int, ...]) -> None:
    wire_only = PaddingCost(0, 10, 0, 10)
    padded = max(real_rows) * len(real_rows)
    expected = PaddingMode.RAGGED if sum(real_rows) < padded else PaddingMode.MAX_LEN
    assert wire_only.choose(real_rows) is expected
    assert PaddingCost(0, 1, 10**9, 1).choose(real_rows) is PaddingMode.MAX_LEN
