"""The attention contract on the host: every value a kernel trusts is checked against the pool."""

import random
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place, check_values
from dp_runtime.core.batch import LocalBatch, RowValues, StateSlots
from dp_runtime.errors import ContractViolation
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.pass_runner import pass_inputs

PAGES = PageGeometry(num_pages=10, page_size=4)
PLACE = Place(3, 17, "target")


def batch() -> LocalBatch:
    """A prefill of 5 tokens, a decode at length 6, and a chunk of 2 on 3."""
    page_table = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    positions = np.array([0, 1, 2, 3, 4, 5, 3, 4], np.int64)
    owner = np.array([0, 0, 0, 0, 0, 1, 2, 2])
    slots = page_table[owner, positions // 4].astype(np.int64) * 4 + positions % 4
    return LocalBatch(
        token_ids=np.arange(8, dtype=np.int64),
        future_token_index=np.full(8, -1, np.int64),
        positions=positions,
        slot_mapping=slots,
        query_lens=np.array([5, 1, 2], np.int32),
        seq_lens=np.array([5, 6, 5], np.int32),
        page_table=page_table,
        sample_rows=np.array([4, 5, 7], np.int64),
    )


def test_a_good_batch_passes() -> None:
    check_values(batch(), PAGES, PLACE)
    check_values(LocalBatch.empty(), PAGES, PLACE)


@pytest.mark.parametrize(
    ("field", "index", "value", "numbers"),
    [
        ("page_table", (0, 1), 10, ("page_table is 10", "num_pages 10")),
        ("page_table", (0, 1), -1, ("page_table is -1", ">= 0")),
        ("page_table", (1, 1), 0, ("page_table is 0", "not null")),
        ("seq_lens", 1, 9, ("seq_lens is 9", "8")),
        ("seq_lens", 2, 1, ("seq_lens - query_lens is -1", ">= 0")),
        ("seq_lens", 1, 7, ("positions[5] is 5", "6")),
        ("positions", 5, 4, ("positions[5] is 4", "5")),
        ("slot_mapping", 0, 39, ("slot_mapping[0] is 39", "4")),
        ("sample_rows", 2, 8, ("sample_rows is 8", "8")),
        ("sample_rows", 0, -1, ("sample_rows is -1", ">= 0")),
    ],
)
def test_a_changed_value_names_place_field_and_both_numbers(
    field: str, index: object, value: int, numbers: tuple[str, str]
) -> None:
    good = batch()
    changed = getattr(good, field).copy()
    changed[index] = value
    bad = replace(good, **{field: changed})
    with pytest.raises(ContractViolation) as error:
        check_values(bad, PAGES, PLACE)
    for text in ("rank 3, step 17, pass target", *numbers):
        assert text in str(error.value)


def explain_by_hand(batch: LocalBatch, pages: PageGeometry, place: Place) -> None:
    """Raise ContractViolation for the first value that is not in order: an oracle of its own."""
    capacity = batch.page_table.shape[1] * pages.page_size
    _refuse_unless(batch.query_lens.min() >= 1, place, "query_lens", batch.query_lens.min(), ">= 1")
    shortest = (batch.seq_lens - batch.query_lens).min()
    _refuse_unless(shortest >= 0, place, "seq_lens - query_lens", shortest, ">= 0")
    _refuse_unless(
        batch.seq_lens.max() <= capacity, place, "seq_lens", batch.seq_lens.max(), capacity
    )
    low, high = batch.page_table.min(), batch.page_table.max()
    _refuse_unless(low >= 0, place, "page_table", low, ">= 0")
    _refuse_unless(
        high < pages.num_pages, place, "page_table", high, f"< num_pages {pages.num_pages}"
    )
    used = -(-batch.seq_lens // pages.page_size)
    owned = np.arange(batch.page_table.shape[1]) < used[:, None]
    _refuse_unless(
        batch.page_table[owned].min() > 0, place, "page_table", 0, "pages in use are not null"
    )
    _check_rows_by_hand(batch, pages, place)
    if len(batch.sample_rows):
        first, last = batch.sample_rows.min(), batch.sample_rows.max()
        _refuse_unless(first >= 0, place, "sample_rows", first, ">= 0")
        _refuse_unless(last < batch.num_tokens, place, "sample_rows", last, f"< {batch.num_tokens}")


def _check_rows_by_hand(batch: LocalBatch, pages: PageGeometry, place: Place) -> None:
    """Positions run up to seq_len - 1, and every row writes to the page of its position."""
    owner = np.repeat(np.arange(batch.num_requests), batch.query_lens)
    starts = np.cumsum(batch.query_lens) - batch.query_lens
    expected = (batch.seq_lens - batch.query_lens - starts)[owner] + np.arange(batch.num_tokens)
    wrong = np.flatnonzero(batch.positions != expected)
    if len(wrong):
        row = wrong[0]
        _refuse_unless(False, place, f"positions[{row}]", batch.positions[row], expected[row])
    page = batch.page_table[owner, batch.positions // pages.page_size]
    slots = page.astype(np.int64) * pages.page_size + batch.positions % pages.page_size
    wrong = np.flatnonzero(batch.slot_mapping != slots)
    if len(wrong):
        row = wrong[0]
        _refuse_unless(False, place, f"slot_mapping[{row}]", batch.slot_mapping[row], slots[row])


def _refuse_unless(
    ok: bool | np.bool_, place: Place, field: str, value: object, allowed: object
) -> None:
    if not ok:
        raise ContractViolation(f"{place}: {field} is {value}, allowed: {allowed}")


def changed_at_random(draw: random.Random) -> LocalBatch:
    """A good batch with up to two values that are off by anything."""
    changed = batch()
    for _ in range(draw.randint(0, 2)):
        name = draw.choice(["page_table", "seq_lens", "positions", "slot_mapping", "sample_rows"])
        array = getattr(changed, name).copy()
        maximum = np.iinfo(array.dtype).max - 100
        array.reshape(-1)[draw.randrange(array.size)] += draw.choice(
            [-50, -4, -1, 1, 2, 4, maximum]
        )
        changed = replace(changed, **{name: array})
    return changed


def test_a_batch_is_refused_exactly_when_some_value_can_be_named() -> None:
    draw, refused = random.Random(0), 0
    for _ in range(3000):
        changed = changed_at_random(draw)
        try:
            explain_by_hand(changed, PAGES, PLACE)
        except ContractViolation:
            refused += 1
            with pytest.raises(ContractViolation):
                check_values(changed, PAGES, PLACE)
        else:
            check_values(changed, PAGES, PLACE)
    assert 1000 < refused < 2500


def test_zero_query_rows_in_a_request_violate_the_contract() -> None:
    good = batch()
    query_lens = np.array([6, 0, 2], np.int32)
    with pytest.raises(ContractViolation, match="query_lens is 0"):
        check_values(replace(good, query_lens=query_lens), PAGES, PLACE)


@pytest.mark.parametrize("field", ["future_token_index", "positions", "slot_mapping"])
def test_arrays_of_another_length_can_not_be_a_batch(field: str) -> None:
    good = batch()
    with pytest.raises(AssertionError, match=field):
        replace(good, **{field: getattr(good, field)[:-1].copy()})


def test_the_arrays_of_a_batch_are_read_only() -> None:
    good = replace(
        batch(),
        states=StateSlots(np.array([5, 1, 3]), np.array([True, False, False])),
        embeds=RowValues(np.array([0, 2]), np.zeros((2, 4), np.float32)),
    )
    parts = good.states, good.embeds, good.images, good.replays
    arrays = chain.from_iterable(vars(each).values() for each in (good, *parts))
    for array in (each for each in arrays if isinstance(each, np.ndarray)):
        with pytest.raises(ValueError, match="read-only"):
            array.reshape(-1)[:] = 0


def test_metadata_holds_real_sequences_only() -> None:
    metadata = AttentionMetadata.build(batch(), PAGES, PLACE, torch.device("cpu"))
    assert metadata.batch_size == 3
    assert metadata.num_tokens == 8
    assert metadata.cu_seqlens_q.tolist() == [0, 5, 6, 8]
    assert metadata.cu_seqlens_q.dtype == metadata.seq_lens.dtype == torch.int32
    empty = AttentionMetadata.build(LocalBatch.empty(), PAGES, PLACE, torch.device("cpu"))
    assert (empty.batch_size, empty.num_tokens) == (0, 0)


def test_lengths_that_are_bounds_move_back_on_the_device() -> None:
    """Two verifications of 3 rows, one of them 2 tokens behind, and a chunk that is where it is."""
    page_table = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 0]], np.int32)
    positions = np.array([6, 7, 8, 7, 8, 9, 3, 4], np.int64)
    owner = np.array([0, 0, 0, 1, 1, 1, 2, 2])
    bounds = replace(
        batch(),
        positions=positions,
        slot_mapping=page_table[owner, positions // 4].astype(np.int64) * 4 + positions % 4,
        query_lens=np.array([3, 3, 2], np.int32),
        seq_lens=np.array([9, 10, 5], np.int32),
        page_table=page_table,
        lengths_are_bounds=np.array([True, True, False]),
    )
    exact = bounds.rewound(np.array([2, 0, 0]), PAGES.page_size)
    assert not len(exact.lengths_are_bounds), "nothing is a bound any more"
    cpu = torch.device("cpu")
    num_rejected = torch.tensor([2, 0])
    moved = AttentionMetadata.build(bounds, PAGES, PLACE, cpu, num_rejected)
    built = AttentionMetadata.build(exact, PAGES, PLACE, cpu)
    for name in ("seq_lens", "slot_mapping", "page_table", "cu_seqlens_q"):
        assert getattr(moved, name).tolist() == getattr(built, name).tolist(), name
    assert moved.seq_lens_host.tolist() == [9, 10, 5], "mirrors hold the bounds"
    inputs = pass_inputs(
        bounds,
        FutureTokens(torch.zeros(0, dtype=torch.int64), torch.zeros(0, 0), num_rejected),
        cpu,
        torch.zeros(0, 0),
    )
    assert inputs.positions.tolist() == exact.positions.tolist()
