"""Which graphs are captured, and which one serves a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.parallel.buckets import GraphBuckets, GraphKey, PiecewiseBuckets
from dp_runtime.parallel.gather_layout import FACTOR, PARTS, SMALLEST, GatherLayout

MAX_REQUESTS = st.integers(1, 512)
LENGTHS = st.integers(1, 8)
LAYOUTS = st.one_of(
    st.just(PARTS), st.builds(GatherLayout.packed, st.integers(2, 8), st.just(5000))
)


@given(MAX_REQUESTS, LENGTHS, LAYOUTS, st.data())
def test_every_step_has_a_graph_that_holds_it(
    max_requests: int, length: int, layout: GatherLayout, data: st.DataObject
) -> None:
    ranks = layout.packed_ranks if layout.packed_ranks > 1 else data.draw(st.integers(1, 8))
    counts = data.draw(st.lists(st.integers(0, max_requests), min_size=ranks, max_size=ranks))
    buckets = GraphBuckets(max_requests, length, layout=layout)
    rows = tuple(count * length for count in counts)
    if not any(rows):
        return
    gathered = buckets.gathered(rows)
    plan = layout.plan(rows, gathered, counted=True)
    assert plan.rows_per_rank == gathered <= max(buckets.max_rows, SMALLEST)
    for count in rows:
        own = buckets.local(count)
        assert count <= own <= layout.most_rows(gathered), "null rows fit what is gathered"
        assert own % length == 0, "null rows are whole sequences"
        assert GraphKey(own, gathered) in buckets.graph_keys()


@given(MAX_REQUESTS, LENGTHS, LAYOUTS)
def test_there_are_few_graphs_and_idle_ranks_run_no_attention(
    max_requests: int, length: int, layout: GatherLayout
) -> None:
    buckets = GraphBuckets(max_requests, length, layout=layout)
    keys, max_rows = buckets.graph_keys(), buckets.max_rows
    assert len(set(keys)) == len(keys)
    sizes = {key.gathered_rows for key in keys}
    doublings = 2 + max(max_rows * layout.packed_ranks // SMALLEST, 1).bit_length()
    assert len(sizes) <= 2 + doublings // (layout.factor // 2)
    assert all(GraphKey(0, size) in keys for size in sizes), "a rank without rows"
    assert max(key.local_rows for key in keys) == max_rows
    assert keys[0].local_rows == max_rows, "the largest comes first, the others fit its memory"


@given(MAX_REQUESTS, LENGTHS, st.integers(1, 4096), LAYOUTS, st.data())
def test_a_rank_that_decodes_has_a_graph_beside_any_prefill(
    max_requests: int, length: int, max_num_tokens: int, layout: GatherLayout, data: st.DataObject
) -> None:
    stages = PiecewiseBuckets.for_steps(max_num_tokens, layout)
    buckets = GraphBuckets(max_requests, length, stages.sizes, layout)
    keys, beside = buckets.graph_keys(), buckets.keys_beside_prefill()
    assert not {*keys} & {*beside}
    assert keys == GraphBuckets(max_requests, length, layout=layout).graph_keys()
    largest = data.draw(st.integers(1, stages.max_rows))
    gathered = stages.gathered((largest,) * layout.packed_ranks)
    for rows in range(0, min(largest, buckets.max_rows) + 1, length):
        own = buckets.local(rows)
        if own <= layout.most_rows(gathered):  # null rows fit what is gathered
            assert GraphKey(own, gathered) in (*keys, *beside)


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_a_captured_stage_holds_the_largest_rank(max_num_tokens: int, largest: int) -> None:
    buckets = PiecewiseBuckets.for_steps(max_num_tokens)
    assert buckets.cover(largest) == (0 < largest <= buckets.max_rows)
    if buckets.cover(largest):
        gathered = buckets.gathered((largest, largest // 2))
        assert gathered in buckets.sizes
        assert largest <= gathered == buckets.own_rows(gathered) < FACTOR * max(largest, SMALLEST)
    assert list(buckets.sizes) == sorted(set(buckets.sizes), reverse=True)
    assert buckets.sizes[0] == buckets.max_rows <= max_num_tokens


@given(st.integers(1, 10_000), st.lists(st.integers(0, 2048), min_size=2, max_size=8))
def test_a_packed_stage_holds_all_ranks_and_half_of_it_is_real(
    max_num_tokens: int, counts: list[int]
) -> None:
    layout = GatherLayout.packed(len(counts), max_num_tokens)
    buckets = PiecewiseBuckets.for_steps(max_num_tokens, layout)
    rows = tuple(min(count, buckets.max_rows) for count in counts)
    if not any(rows):
        return
    gathered = buckets.gathered(rows)
    plan = layout.plan(rows, gathered, counted=True)
    assert gathered in buckets.sizes
    assert max(rows) <= buckets.own_rows(gathered) <= buckets.max_rows
    assert sum(rows) <= plan.total_gathered == gathered * len(rows)
    assert plan.total_gathered < 2 * max(sum(rows) + len(rows), SMALLEST)
    starts, real = plan.row_ranges
    assert (starts[1:] == starts[:-1] + real[:-1]).all(), "rows follow one another"
