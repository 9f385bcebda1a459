"""States that are left in other slots on the way, and chunks that go on from such states."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.gated_delta.rows import HeadShape
from dp_runtime.kernels.slot_copy import copy_slots, slot_table
from tests.dp_runtime.kernels.gated_delta.oracle import (
    DEVICE,
    Caches,
    Net,
    Rows,
    run,
    sequences_of,
)
from tests.dp_runtime.kernels.gated_delta.test_delta_kernels import assert_request

SHAPE = HeadShape(1, 2, 16, 24)


@pytest.mark.parametrize("max_drafts", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_state_is_left_where_a_chunk_ends(dtype: torch.dtype, max_drafts: int) -> None:
    """Of one request of three, after 64 of its rows; all others' slots are as they were."""
    torch.manual_seed(0)
    net, lengths, slots = Net.draw(SHAPE, 4, dtype), [70, 3, 130], [4, 1, 3]
    caches = Caches.dirty(net, 7, max_drafts)
    rows = Rows.draw(SHAPE, sum(lengths), dtype)
    drafts = ([0] * 3, [2] * 3) if max_drafts else None
    of = sequences_of(lengths, slots, [True] * 3, drafts, ([5, 0, 2], [64, 0, 128]))
    outputs = run(net, rows, caches, of)
    for start, length, slot, track, tracked in ((0, 70, 4, 5, 64), (73, 130, 3, 2, 128)):
        own = slice(start, start + length)
        assert_request(net, rows[own], outputs[own], caches, slot)
        before = slice(start, start + tracked)
        assert_request(net, rows[before], outputs[before], caches, track)
    for slot in (0, 6):
        assert caches.states[slot].isnan().all()
        assert caches.windows[slot].isnan().all()


def test_a_second_chunk_leaves_a_state_too() -> None:
    torch.manual_seed(1)
    net, rows = Net.draw(SHAPE, 4), Rows.draw(SHAPE, 140)
    caches = Caches.dirty(net, 4)
    first = run(net, rows[slice(0, 64)], caches, sequences_of([64], [1], [True]))
    of = sequences_of([76], [1], [False], tracks=([2], [64]))
    second = run(net, rows[slice(64, 140)], caches, of)
    outputs = torch.cat((first, second))
    assert_request(net, rows, outputs, caches, 1)
    assert_request(net, rows[slice(0, 128)], outputs[:128], caches, 2)


@pytest.mark.parametrize(("length", "accepted"), [(1, 0), (9, 3), (70, 1)])
def test_a_chunk_goes_on_from_a_copied_state_and_some_of_its_drafts(
    length: int, accepted: int
) -> None:
    """The drafts' inputs are those of rows that came to be; who copied it took fewer of them."""
    torch.manual_seed(length)
    net, rows = Net.draw(SHAPE, 4), Rows.draw(SHAPE, 5 + 1 + 3)
    caches = Caches.dirty(net, 4, 3)
    run(net, rows[slice(0, 5)], caches, sequences_of([5], [1], [True], ([0], [0])))
    run(net, rows[slice(5, 9)], caches, sequences_of([4], [1], [False], ([3], [0])))
    assert caches.draft_gates is not None
    table = slot_table([caches.windows, caches.states, caches.draft_gates])
    copy_slots(*table, torch.tensor([[1, 3]], device=DEVICE))
    more = Rows.draw(SHAPE, length)
    of = sequences_of([length], [3], [False], ([0], [accepted]))
    found = run(net, more, caches, of)
    whole = Rows.join([rows[slice(0, 6 + accepted)], more])
    assert_request(net, whole, found, caches, 3, slice(6 + accepted, None))
    again = run(net, rows[slice(0, 1)], caches, sequences_of([1], [1], [False], ([0], [3])))
    due = Rows.join([rows, rows[slice(0, 1)]])
    assert_request(net, due, again, caches, 1, slice(9, None))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_copies_of_slots_are_copies_of_bits(dtype: torch.dtype) -> None:
    tensors = [torch.randn(5, 3, 2).to(DEVICE, dtype), torch.randn(5, 1500, 3, 2).to(DEVICE)]
    due = [tensor.clone() for tensor in tensors]
    copy_slots(*slot_table(tensors), torch.tensor([[1, 3], [4, 2]], device=DEVICE))
    for tensor, copy in zip(tensors, due):
        copy[[3, 2]] = copy[[1, 4]]
        assert torch.equal(tensor, copy)
