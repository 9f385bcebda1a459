"""Verified drafts give the bits of plain decoding, whichever of them are accepted."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from dp_runtime.kernels.gated_delta.rows import HeadShape
from tests.dp_runtime.kernels.gated_delta.oracle import Caches, Net, Rows, run, sequences_of

SHAPE = HeadShape(1, 2, 16, 16)
MAX_DRAFTS = 3
NUM_ROWS = 24


@dataclass(eq=False)
class Request:
    """Its true rows, how many of them are certain, and which drafts of its last pass are."""

    rows: Rows
    slot: int
    done: int = 0
    accepted: int = 0

    def plain_rows(self) -> Rows:
        return self.rows[slice(self.done, self.done + 1)]

    def draft(self, num_drafts: int, right: int) -> Rows:
        """Return the next row and drafts, of which the first `right` are what comes next."""
        true = self.rows[slice(self.done, self.done + 1 + right)]
        wrong = Rows.draw(SHAPE, num_drafts - right, true.qkv.dtype)
        return Rows.join([true, wrong])


class Twins:
    """Requests that are decoded twice: with drafts, and row by row on memory of their own."""

    def __init__(self, lengths: list[int], slots: list[int], dtype: torch.dtype) -> None:
        self.net = Net.draw(SHAPE, 4, dtype)
        self.requests = [
            Request(Rows.draw(SHAPE, length + NUM_ROWS, dtype), slot)
            for length, slot in zip(lengths, slots)
        ]
        self.caches = Caches.dirty(self.net, 9, MAX_DRAFTS)
        self.plain = Caches.dirty(self.net, 9)
        prompts = Rows.join([r.rows[slice(0, n)] for r, n in zip(self.requests, lengths)])
        stale = [5] * len(lengths)  # of the slots' last owners
        fresh = [True] * len(lengths)
        with_drafts = sequences_of(lengths, slots, fresh, ([0] * len(lengths), stale))
        found = run(self.net, prompts, self.caches, with_drafts)
        due = run(self.net, prompts, self.plain, sequences_of(lengths, slots, fresh))
        assert torch.equal(found, due)
        for request, length in zip(self.requests, lengths):
            request.done = length

    def verify(self, drafts: list[int], right: list[int]) -> None:
        """Run one pass of all requests and a padding one; compare the rows that are accepted."""
        parts = [r.draft(n, m) for r, n, m in zip(self.requests, drafts, right)]
        padding = Rows.draw(SHAPE, 1 + MAX_DRAFTS, self.net.conv.dtype)
        lengths = [1 + n for n in drafts] + [1 + MAX_DRAFTS]
        sequences = sequences_of(
            lengths,
            [r.slot for r in self.requests] + [0],
            [False] * len(lengths),
            ([*drafts, MAX_DRAFTS], [r.accepted for r in self.requests] + [MAX_DRAFTS]),
        )
        found = run(self.net, Rows.join([*parts, padding]), self.caches, sequences)
        for request, mine, count in zip(self.requests, found.split(lengths), right):
            for row in mine[: 1 + count]:
                assert torch.equal(row, self.decode(request)), "an accepted row"
            request.accepted = count
        assert self.caches.states[0].isnan().all(), "padding writes no slot"

    def decode(self, request: Request) -> Tensor:
        sequences = sequences_of([1], [request.slot], [False])
        row = run(self.net, request.plain_rows(), self.plain, sequences)[0]
        request.done += 1
        return row

    def check(self) -> None:
        """Decode without drafts, which leaves nothing for later: the memories are equal."""
        self.verify([0] * len(self.requests), [0] * len(self.requests))
        columns = self.net.width - 1
        for slot in (r.slot for r in self.requests):
            assert torch.equal(self.caches.states[slot], self.plain.states[slot])
            window = self.caches.windows[slot, :columns]
            assert torch.equal(window, self.plain.windows[slot])


counts = st.tuples(st.integers(0, MAX_DRAFTS), st.integers(0, MAX_DRAFTS)).map(sorted)
passes = st.lists(st.lists(counts, min_size=2, max_size=2), min_size=1, max_size=3)
prompts = st.lists(st.sampled_from([1, 2, 8, 11]), min_size=2, max_size=2)
SLOW_CHECK = [HealthCheck.too_slow]


@settings(max_examples=2, suppress_health_check=SLOW_CHECK)
@given(passes, prompts)
def test_any_drafts_accepted_in_any_number(
    script: list[list[list[int]]], lengths: list[int]
) -> None:
    _follow(script, lengths)


@pytest.mark.slow
@settings(max_examples=50, suppress_health_check=SLOW_CHECK)
@given(passes, prompts)
def test_many_scripts_of_drafts(script: list[list[list[int]]], lengths: list[int]) -> None:
    _follow(script, lengths)


def _follow(script: list[list[list[int]]], lengths: list[int]) -> None:
    torch.manual_seed(8)
    twins = Twins(lengths, [7, 4], torch.float32)
    for one_pass in script:
        twins.verify([drafts for _, drafts in one_pass], [right for right, _ in one_pass])
    twins.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_all_drafts_or_none_pass_after_pass(dtype: torch.dtype) -> None:
    torch.manual_seed(9)
    twins = Twins([9, 1], [2, 5], dtype)
    for right in ([3, 0], [3, 0], [0, 2]):
        twins.verify([MAX_DRAFTS] * 2, right)
    twins.check()


def test_a_new_owner_of_a_slot_replays_nothing() -> None:
    """The drafts that its last owner left there were accepted, and are not the new one's."""
    torch.manual_seed(10)
    twins = Twins([2], [3], torch.float32)
    twins.verify([3], [3])
    rows = Rows.draw(SHAPE, 2)
    alone = Caches.dirty(twins.net, 9)
    due = run(twins.net, rows, alone, sequences_of([2], [3], [True]))
    found = run(twins.net, rows, twins.caches, sequences_of([2], [3], [True], ([0], [3])))
    assert torch.equal(found, due)
    assert torch.equal(twins.caches.states[3], alone.states[3])
