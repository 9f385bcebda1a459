"""How calls are timed cold, from spans as of a profiler, and which rows are printed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.kernels.split_tile import SplitTile
from examples.benchmarks.harness.cold_timing import Span, call_times
from examples.benchmarks.kernels.attention_decode import Point, Results
from examples.benchmarks.kernels.attention_ragged import BF16

SPEC = AttentionSpec(32, 4, 128, 64, BF16, BF16, frozenset({1}))


def before(at: float) -> list[Span]:
    """The last of them starts while the one before it runs."""
    return [
        (at, at + 30, "cold_code"),
        (at + 31, at + 180, "cold_memory"),
        (at + 170, at + 182, "cold_rows"),
    ]


def test_a_call_takes_from_the_end_of_what_writes_its_rows_to_its_own() -> None:
    spans = [
        *before(0),
        (175.0, 190.0, "split_kernel"),  # started early: the wait is not its own
        (180.0, 195.5, "combine_kernel"),
        *before(200),
        (384.0, 400.0, "kernel_mha"),  # the gap counts
    ]
    assert call_times(spans) == [13.5, 18.0]


def results_of(few: SplitTile, many: SplitTile) -> Results:
    """In which each of two tiles is the faster one with 4, or with 64 requests."""
    results = Results()
    for requests, best in ((4, few), (64, many)):
        for even, us in ((True, 10.0), (False, 12.0)):
            times: dict[str | SplitTile, float] = {"XQA": 2 * us, few: us + 1, many: us + 1}
            results.add(Point(1, requests, even), {**times, best: us})
    return results


def test_few_requests_get_a_row_of_their_own_if_another_tile_is_best_for_them() -> None:
    narrow, wide = SplitTile(32), SplitTile(64)
    assert list(results_of(narrow, wide).rows(SPEC)) == [
        f"Measured(128, 8, 1, {narrow}, ((4, 22.0, 11.0),)),",
        f"Measured(128, 8, 1, {wide}, ((64, 22.0, 11.0),)),",
    ]
    assert list(results_of(wide, wide).rows(SPEC)) == [
        f"Measured(128, 8, 1, {wide}, ((4, 22.0, 11.0), (64, 22.0, 11.0),)),"
    ]
