"""How a pass runs follows from the ranks' rows and votes, and from sizes that all ranks share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.core.step_program import Pass
from dp_runtime.parallel.buckets import GraphBuckets, PiecewiseBuckets
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPlan, ExecutionPolicy
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan, PaddingPolicy

QUERY_LEN = 4
MAX_REQUESTS = 30
rank_rows = st.lists(st.integers(0, 40), min_size=1, max_size=6).map(tuple)
modes = st.sampled_from([PaddingMode.MAX_LEN, PaddingMode.RAGGED])


def policy_of(mode: PaddingMode, captured: bool, max_piecewise_rows: int) -> ExecutionPolicy:
    graphs = {(Pass.TARGET, QUERY_LEN): GraphBuckets(MAX_REQUESTS, QUERY_LEN)} if captured else {}
    piecewise = PiecewiseBuckets(max_piecewise_rows)
    return ExecutionPolicy(PaddingPolicy(mode), graphs, piecewise, counted=True)


@given(rank_rows, modes, st.booleans(), st.sampled_from([0, 16, 20, 100]))
def test_the_first_way_that_fits_is_taken(
    real_rows: tuple[int, ...], mode: PaddingMode, all_fit_graphs: bool, max_piecewise_rows: int
) -> None:
    policy = policy_of(mode, all_fit_graphs, max_piecewise_rows)
    plan = policy.plan(Pass.TARGET, QUERY_LEN, real_rows, all_fit_graphs)
    largest = max(real_rows)
    if not largest:
        expected = ExecutionMode.EMPTY
    elif all_fit_graphs:
        expected = ExecutionMode.GRAPH
    elif largest <= max_piecewise_rows:
        expected = ExecutionMode.PIECEWISE
    else:
        expected = ExecutionMode.EAGER
    assert plan.mode is expected
    assert plan.query_len == QUERY_LEN
    assert plan.padding.real_rows == real_rows
    if expected in (ExecutionMode.EMPTY, ExecutionMode.EAGER):
        assert plan.padding == PaddingPlan.for_mode(mode, real_rows)
    else:
        assert set(plan.padding.gathered_rows) == {plan.padding.rows_per_rank}
        assert plan.padding.counted


CASES = [
    ((51, 8), ExecutionMode.EAGER, (51, 8)),
    ((50, 8), ExecutionMode.PIECEWISE, (50, 50)),
    ((16, 8), ExecutionMode.PIECEWISE, (16, 16)),
    ((17, 0), ExecutionMode.PIECEWISE, (50, 50)),
    ((0, 0), ExecutionMode.EMPTY, (0, 0)),
]


@pytest.mark.parametrize(("real_rows", "mode", "gathered_rows"), CASES)
def test_stages_are_replayed_at_the_sizes_they_were_captured_at(
    real_rows: tuple[int, ...], mode: ExecutionMode, gathered_rows: tuple[int, ...]
) -> None:
    plan = policy_of(PaddingMode.RAGGED, False, 50).plan(Pass.TARGET, 1, real_rows, False)
    assert (plan.mode, plan.padding.gathered_rows) == (mode, gathered_rows)


def test_a_graph_has_the_bucket_of_the_largest_rank() -> None:
    plan = policy_of(PaddingMode.RAGGED, True, 0).plan(Pass.TARGET, QUERY_LEN, (12, 40, 0), True)
    padding = PaddingPlan((12, 40, 0), (64, 64, 64), counted=True)
    assert plan == ExecutionPlan(ExecutionMode.GRAPH, QUERY_LEN, padding)
