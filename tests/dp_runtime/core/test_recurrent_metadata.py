"""The contract of recurrent layers on the host: whose state a kernel reads and writes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dp_runtime.core.attention_metadata import Place
from dp_runtime.core.batch import LocalBatch, StateSlots
from dp_runtime.core.recurrent_metadata import AcceptedDrafts, RecurrentMetadata, RowBlocks
from dp_runtime.errors import ContractViolation
from tests.dp_runtime.core.test_attention_metadata import batch as paged
from tests.dp_runtime.paged import paged_batch, random_page_table

CPU = torch.device("cpu")
PLACE = Place(3, 17, "target")
NUM_SLOTS = 6


def batch() -> LocalBatch:
    """A prefill of 5 tokens, a decode at length 6, and a chunk of 2 on 3."""
    slots, fresh = np.array([5, 1, 3]), np.array([True, False, False])
    return replace(paged(), states=StateSlots(slots, fresh))


def with_states(of: LocalBatch, **changes: np.ndarray) -> LocalBatch:
    return replace(of, states=replace(of.states, **changes))


def build(of: LocalBatch) -> RecurrentMetadata:
    return RecurrentMetadata.build(of, NUM_SLOTS, PLACE, CPU)


def test_metadata_holds_what_the_batch_says() -> None:
    of = batch()
    metadata = build(of)
    assert metadata.batch_size == 3
    assert (metadata.cu_seqlens.tolist(), metadata.cu_seqlens.dtype) == ([0, 5, 6, 8], torch.int32)
    assert metadata.query_lens_host is of.query_lens
    assert (metadata.slots.tolist(), metadata.slots.dtype) == ([5, 1, 3], torch.int64)
    assert metadata.is_fresh.tolist() == [True, False, False]
    assert metadata.is_fresh.dtype == torch.bool


def test_an_idle_rank_has_metadata_of_nobody() -> None:
    metadata = build(LocalBatch.empty())
    assert metadata.batch_size == 0
    assert metadata.cu_seqlens.tolist() == [0]
    assert (metadata.slots.shape, metadata.is_fresh.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("field", "index", "value", "numbers"),
    [
        ("slots", 0, 6, ("state_slots is 6", "1..5")),
        ("slots", 2, 0, ("state_slots is 0", "1..5")),
        ("slots", 1, -1, ("state_slots is -1", "1..5")),
        ("slots", 1, 3, ("state_slots has 3 twice", "once")),
        ("is_fresh", 1, True, ("is_fresh[1] is True at position 5", "only there")),
        ("is_fresh", 0, False, ("is_fresh[0] is False at position 0", "only there")),
    ],
)
def test_a_changed_value_names_place_field_and_what_is_allowed(
    field: str, index: int, value: int, numbers: tuple[str, str]
) -> None:
    array = getattr(batch().states, field).copy()
    array[index] = value
    with pytest.raises(ContractViolation) as error:
        build(with_states(batch(), **{field: array}))
    for text in ("rank 3, step 17, pass target", *numbers):
        assert text in str(error.value)


def test_drafts_come_with_what_was_accepted_before() -> None:
    accepted = AcceptedDrafts(NUM_SLOTS, CPU)
    accepted.write(torch.tensor([1, 5, 3]), torch.tensor([2, 4]))
    of = with_states(batch(), num_drafts=np.array([0, 0, 1], np.int32))
    drafts = RecurrentMetadata.build(of, NUM_SLOTS, PLACE, CPU, accepted).drafts
    assert drafts is not None
    assert drafts.num_drafts.tolist() == [0, 0, 1]
    assert drafts.num_accepted.tolist() == [4, 2, 0]
    assert {drafts.num_drafts.dtype, drafts.num_accepted.dtype} == {torch.int32}
    accepted.write(torch.tensor([5]), None)
    undrafted = RecurrentMetadata.build(batch(), NUM_SLOTS, PLACE, CPU, accepted).drafts
    assert undrafted is not None
    assert (undrafted.num_drafts.tolist(), undrafted.num_accepted.tolist()) == ([0] * 3, [0, 2, 0])
    assert build(batch()).drafts is None, "slots without room for drafts"


@pytest.mark.parametrize(
    ("num_drafts", "room", "numbers"),
    [
        ([0, 1, 0], True, ("num_drafts[1] is 1", "allowed: 0..0")),
        ([0, 0, 2], True, ("num_drafts[2] is 2", "allowed: 0..1")),
        ([-1, 0, 0], True, ("num_drafts[0] is -1", "allowed: 0..4")),
        ([1, 0, 0], False, ("num_drafts[0] is 1", "allowed: 0..0")),
    ],
)
def test_drafts_that_no_slot_has_room_for_are_refused(
    num_drafts: list[int], room: bool, numbers: tuple[str, str]
) -> None:
    of = with_states(batch(), num_drafts=np.array(num_drafts, np.int32))
    accepted = AcceptedDrafts(NUM_SLOTS, CPU) if room else None
    with pytest.raises(ContractViolation) as error:
        RecurrentMetadata.build(of, NUM_SLOTS, PLACE, CPU, accepted)
    for text in ("rank 3, step 17, pass target", *numbers):
        assert text in str(error.value)


def tracked(slots: list[int], rows: list[int]) -> LocalBatch:
    """A prefill of 150 tokens, a decode, and a chunk of 64; requests 1 and 2 of slots."""
    table, _ = random_page_table([150, 9, 70], 16, np.random.default_rng(0))
    return replace(
        paged_batch([(150, 150), (1, 9), (64, 70)], table, 16),
        states=replace(
            batch().states,
            track_slots=np.array(slots, np.int64),
            track_rows=np.array(rows, np.int32),
        ),
    )


def test_tracks_are_slots_beside_those_of_the_requests() -> None:
    tracks = build(tracked([4, 0, 0], [128, 0, 0])).tracks
    assert tracks is not None
    assert (tracks.slots.tolist(), tracks.rows.tolist()) == ([4, 0, 0], [128, 0, 0])
    assert build(batch()).tracks is None


@pytest.mark.parametrize(
    ("slots", "rows", "text"),
    [
        ([3, 0, 0], [64, 0, 0], "track_slots are [3] beside"),
        ([6, 0, 0], [64, 0, 0], "track_slots are [6] beside"),
        ([-1, 0, 0], [64, 0, 0], "track_slots are [-1] beside"),
        ([4, 0, 4], [64, 0, 0], "track_slots are [4, 4] beside"),
        ([4, 0, 0], [63, 0, 0], "track_rows[0] is 63 of 150"),
        ([4, 0, 0], [0, 0, 0], "track_rows[0] is 0 of 150"),
        ([4, 0, 0], [192, 0, 0], "track_rows[0] is 192 of 150"),
        ([0, 0, 4], [0, 0, 64], "track_rows[2] is 64 of 64"),
        ([0, 0, 0], [64, 0, 0], "track_rows[0] is 64 of 150"),
    ],
)
def test_tracks_elsewhere_are_refused(slots: list[int], rows: list[int], text: str) -> None:
    with pytest.raises(ContractViolation) as error:
        build(tracked(slots, rows))
    for part in ("rank 3, step 17, pass target", text):
        assert part in str(error.value)


def test_requests_without_slots_are_refused() -> None:
    with pytest.raises(ContractViolation, match="0 state slots for 3 requests"):
        build(paged())


def test_a_batch_has_a_slot_and_a_flag_for_each_request_or_none() -> None:
    with pytest.raises(AssertionError, match="one state slot per request"):
        with_states(batch(), slots=np.array([1]), is_fresh=np.array([True]))
    with pytest.raises(AssertionError, match="is_fresh has one entry"):
        with_states(batch(), is_fresh=np.array([True]))


def test_each_row_is_in_one_block() -> None:
    """Sequences of more than 8 rows are run in chunks of 64, the others row by row."""
    tables = RowBlocks.of(np.array([1, 65, 0, 8, 9, 128], np.int32), CPU)
    chunks = [[1, 0], [1, 1], [4, 0], [5, 0], [5, 1]]
    assert tables.num_chunks == len(chunks)
    assert tables.blocks.tolist() == [*chunks, [0, 0], [3, 0]]
    assert tables.chunked.tolist() == [[1, 0], [4, 2], [5, 3]]
    assert tables.stepped.tolist() == [0, 3]
    assert {x.dtype for x in (tables.blocks, tables.chunked, tables.stepped)} == {torch.int32}
    nobody = RowBlocks.of(np.zeros(0, np.int32), CPU)
    assert (nobody.blocks.shape, nobody.chunked.shape, nobody.num_chunks) == ((0, 2), (0, 2), 0)
