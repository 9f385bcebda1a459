"""Which graphs are captured, and which one serves a step."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dp_runtime.parallel.buckets import (
    FACTOR,
    SMALLEST,
    GraphBuckets,
    GraphKey,
    PieceBuckets,
    PiecewiseBuckets,
)

MAX_REQUESTS = st.integers(1, 512)
LENGTHS = st.integers(1, 8)


@given(MAX_REQUESTS, LENGTHS, st.lists(st.integers(0, 512), min_size=1, max_size=8))
def test_every_step_has_a_graph_that_holds_it(
    max_requests: int, length: int, counts: list[int]
) -> None:
    buckets = GraphBuckets(max_requests, length)
    rows = [min(count, max_requests) * length for count in counts]
    if not any(rows):
        return
    gathered = buckets.gathered(max(rows))
    assert max(rows) <= gathered <= max(buckets.max_rows, SMALLEST)
    for count in rows:
        own = buckets.local(count)
        assert count <= own <= gathered, "null rows fit what is gathered"
        assert own % length == 0, "null rows are whole sequences"
        assert GraphKey(own, gathered) in buckets.graph_keys()


@given(MAX_REQUESTS, LENGTHS)
def test_there_are_few_graphs_and_idle_ranks_run_no_attention(
    max_requests: int, length: int
) -> None:
    buckets = GraphBuckets(max_requests, length)
    keys, max_rows = buckets.graph_keys(), buckets.max_rows
    assert len(set(keys)) == len(keys)
    sizes = {key.gathered_rows for key in keys}
    assert len(sizes) <= 2 + max(max_rows // SMALLEST, 1).bit_length() // (FACTOR // 2)
    assert all(GraphKey(0, size) in keys for size in sizes), "a rank without rows"
    assert max(key.local_rows for key in keys) == max_rows
    assert keys[0].local_rows == max_rows, "the largest comes first, the others fit its memory"


@given(MAX_REQUESTS, LENGTHS, st.integers(1, 4096), st.data())
def test_a_rank_that_decodes_has_a_graph_beside_any_prefill(
    max_requests: int, length: int, max_num_tokens: int, data: st.DataObject
) -> None:
    stages = PiecewiseBuckets.for_steps(max_num_tokens)
    buckets = GraphBuckets(max_requests, length, stages.sizes)
    keys, beside = buckets.graph_keys(), buckets.keys_beside_prefill()
    assert not {*keys} & {*beside}
    assert keys == GraphBuckets(max_requests, length).graph_keys()
    largest = data.draw(st.integers(1, stages.max_rows))
    gathered = stages.gathered(largest)
    for rows in range(0, min(largest, buckets.max_rows) + 1, length):
        own = buckets.local(rows)
        if own <= gathered:  # null rows fit what is gathered
            assert GraphKey(own, gathered) in (*keys, *beside)


@given(st.integers(1, 10_000), st.integers(0, 10_000))
def test_a_captured_stage_holds_the_largest_rank(max_num_tokens: int, largest: int) -> None:
    buckets = PiecewiseBuckets.for_steps(max_num_tokens)
    assert buckets.cover(largest) == (0 < largest <= buckets.max_rows)
    if buckets.cover(largest):
        gathered = buckets.gathered(largest)
        assert gathered in buckets.sizes
        assert largest <= gathered < FACTOR * max(largest, SMALLEST)
    assert list(buckets.sizes) == sorted(set(buckets.sizes), reverse=True)
    assert buckets.sizes[0] == buckets.max_rows <= max_num_tokens


def test_a_bucket_of_pieces_holds_the_rows_without_much_waste() -> None:
    buckets = PieceBuckets(2048)
    assert buckets.sizes[0] == 2048
    for rows in range(1, 2049):
        bucket = buckets.of(rows)
        assert rows <= bucket
        assert bucket < max(2 * rows, 65)
        assert rows <= 256 or bucket <= 1.5 * rows
    assert (PieceBuckets(0).sizes, PieceBuckets(0).keys) == ((), ())
    assert PieceBuckets(1).sizes == (1,)
    assert PieceBuckets(300).sizes == (300, 256, 128, 64)


@given(st.integers(1, 8192), st.booleans(), st.lists(st.integers(0, 4096), min_size=1, max_size=8))
def test_pieces_serve_any_rows_beside_any_others(
    max_num_tokens: int, exchanges: bool, counts: list[int]
) -> None:
    """All ranks' pieces gather alike: each finds its own rows' key by the one gathered size."""
    stages = PiecewiseBuckets.for_steps(max_num_tokens)
    pieces = PieceBuckets(stages.max_rows, exchanges)
    assert pieces.keys[0] == GraphKey(pieces.max_rows, pieces.max_rows), "the largest comes first"
    assert len({*pieces.keys}) == len(pieces.keys)
    real = [min(count, stages.max_rows) for count in counts]
    if not any(real):
        return
    gathered = stages.gathered(max(real))
    for rows in filter(None, real):
        key = pieces.key(rows, gathered)
        assert key in pieces.keys
        assert rows <= key.local_rows <= min(pieces.of(rows), key.gathered_rows)
        assert key.gathered_rows == (gathered if exchanges else key.local_rows)


def test_there_are_few_keys() -> None:
    assert len(PieceBuckets(4096, exchanges=True).keys) == 23
    assert len(PieceBuckets(4096).keys) == 12
    assert PieceBuckets(300, exchanges=True).keys == tuple(
        GraphKey(own, gathered)
        for gathered, owns in ((300, (300, 256, 128, 64)), (256, (256, 128, 64)), (64, (64,)),
                               (16, (16,)))
        for own in owns
    )  # fmt: skip
