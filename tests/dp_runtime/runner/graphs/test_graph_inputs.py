"""What graphs read after each write, with plain memory in place of pinned memory."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dp_runtime.core.batch import LocalBatch, StateSlots
from dp_runtime.core.recurrent_metadata import AcceptedDrafts
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs import graph_inputs
from dp_runtime.runner.graphs.graph_inputs import HOST_BUFFERS, GraphInputs

REQUESTS, TABLE_PAGES, PAGE, DP_SIZE = 8, 6, 4, 3
GATHERED = 40  # rows of each rank


class Done:
    """The event of a copy that never takes time."""

    def synchronize(self) -> None: ...

    def record(self) -> None: ...


@pytest.fixture
def make_inputs(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GraphInputs]:
    def plain(words: int, shapes: dict[str, tuple[int, ...]]) -> Any:
        memory = torch.zeros(words, dtype=torch.int32)
        fields = {n: part.numpy() for n, part in graph_inputs._split(memory, shapes).items()}
        return graph_inputs._HostBuffer(memory, fields, Done())  # type: ignore[arg-type]

    monkeypatch.setattr(graph_inputs, "_host_buffer", plain)

    def make(query_len: int = 1, hidden: int = 0, **recurrent: Any) -> GraphInputs:
        states = torch.zeros(REQUESTS * query_len, hidden)
        return GraphInputs(REQUESTS, query_len, TABLE_PAGES, DP_SIZE, states, PAGE, **recurrent)

    return make


def batch_of(draw: random.Random, requests: int, query_len: int) -> LocalBatch:
    """Decodes or verifications of any lengths over any pages."""
    width = draw.randint(2, TABLE_PAGES)
    lengths = [draw.randint(query_len, width * PAGE) for _ in range(requests)]
    seq_lens = np.array(lengths, np.int32)
    used = -(-seq_lens // PAGE)
    width = int(used.max(initial=0))
    table = np.array([[draw.randint(1, 99) for _ in range(width)] for _ in range(requests)])
    table = table.reshape(requests, width) * (np.arange(width) < used[:, None])
    owner, rows = np.arange(requests).repeat(query_len), requests * query_len
    ahead = np.tile(np.arange(query_len), requests)
    positions = (seq_lens.astype(np.int64) - query_len).repeat(query_len) + ahead
    pages = table[owner, positions // PAGE].astype(np.int64)
    return LocalBatch(
        token_ids=np.array([draw.randint(0, 500) for _ in range(rows)], np.int64),
        future_token_index=np.array(
            [draw.randint(-1, REQUESTS - 1) for _ in range(rows)], np.int64
        ),
        positions=positions,
        slot_mapping=pages * PAGE + positions % PAGE,
        query_lens=np.full(requests, query_len, np.int32),
        seq_lens=seq_lens,
        page_table=table.astype(np.int32),
        sample_rows=np.arange(rows),
    )


def plan_of(*real_rows: int) -> PaddingPlan:
    return PaddingPlan(real_rows, (GATHERED,) * DP_SIZE)


def pending_of(tokens: Tensor, batch: LocalBatch, hidden: int = 0) -> FutureTokens:
    return FutureTokens(tokens, torch.randn(batch.num_tokens, hidden))


@pytest.mark.parametrize(("query_len", "hidden"), [(1, 0), (1, 3), (4, 3)])
def test_every_write_leaves_the_batch_and_null_rows_whatever_was_there_before(
    make_inputs: Callable[..., GraphInputs], query_len: int, hidden: int
) -> None:
    draw, inputs = random.Random(0), make_inputs(query_len, hidden)
    for _ in range(40 * HOST_BUFFERS):
        requests = draw.randint(0, REQUESTS)
        own = draw.randint(requests, REQUESTS)
        rows, own_rows, null = requests * query_len, own * query_len, own - requests
        batch = batch_of(draw, requests, query_len)
        pending = pending_of(torch.arange(draw.randint(1, REQUESTS)) + 1000, batch, hidden)
        inputs.write(batch, own_rows, plan_of(rows, 0, 5), pending)
        each = range(query_len)
        for name, values in (("token_ids", [0] * query_len),
                             ("future_token_index", [-1] * query_len),
                             ("positions", each), ("slot_mapping", each)):  # fmt: skip
            expected = [*getattr(batch, name).tolist(), *[*values] * null]
            assert getattr(inputs, name)[:own_rows].tolist() == expected, name
        assert inputs.seq_lens[:own].tolist() == [*batch.seq_lens.tolist(), *[query_len] * null]
        assert inputs.cu_seqlens_q.tolist() == list(range(0, REQUESTS * query_len + 1, query_len))
        table = np.zeros((own, TABLE_PAGES), np.int32)
        table[:requests, : batch.page_table.shape[1]] = batch.page_table
        assert inputs.page_table[:own].tolist() == table.tolist()
        assert inputs.row_ranges.tolist() == [[0, GATHERED, 2 * GATHERED], [rows, 0, 5]]
        assert inputs.pass_inputs(own_rows).hidden[:rows].equal(pending.hidden)


def test_pending_tokens_come_from_the_device(
    make_inputs: Callable[..., GraphInputs],
) -> None:
    batch, inputs = batch_of(random.Random(1), 3, 1), make_inputs()
    sources = np.array([1, -1, 0], np.int64)
    batch = LocalBatch(**{**vars(batch), "future_token_index": sources})
    inputs.write(batch, 4, plan_of(3, 0, 0), pending_of(torch.tensor([70, 71]), batch))
    expected = [71, int(batch.token_ids[1]), 70, 0]
    assert inputs.pass_inputs(4).token_ids.tolist() == expected


@pytest.mark.parametrize("query_len", [1, 4])
def test_rows_behind_images_are_rotated_by_positions_of_their_own_32(
    make_inputs: Callable[..., GraphInputs], query_len: int
) -> None:
    """Three of them, which are one in a decode; where the cache has the row is another thing."""
    batch, inputs = batch_of(random.Random(5), 3, query_len), make_inputs(query_len)
    rope = batch.positions - np.array([2, 0, 1]).repeat(query_len)
    with_images = replace(batch, rope_positions=np.stack([rope] * 3))
    count = torch.tensor([1, 0, 2])
    tokens = torch.arange(3 * query_len)
    future = FutureTokens(tokens, torch.zeros(len(tokens), 0), count)
    inputs.write(with_images, 4 * query_len, plan_of(3, 0, 0), future)
    lower = count.repeat_interleave(query_len).numpy()
    positions = inputs.positions.tolist()
    assert positions[: 3 * query_len] == (rope - lower).tolist()
    slots = inputs.slot_mapping.tolist()
    assert slots[: 3 * query_len] == batch.rewound(count.numpy(), PAGE).slot_mapping.tolist()


def test_null_rows_alone_are_written_over_a_batch(
    make_inputs: Callable[..., GraphInputs],
) -> None:
    inputs = make_inputs()
    for _ in range(HOST_BUFFERS):
        batch = batch_of(random.Random(2), REQUESTS, 1)
        inputs.write(batch, REQUESTS, plan_of(8, 8, 8), pending_of(torch.arange(8), batch))
    inputs.write_null(5, plan_of(0, 0, 0))
    assert inputs.seq_lens[:5].tolist() == [1] * 5
    assert not inputs.page_table[:5].any()
    assert not inputs.positions[:5].any()
    assert inputs.row_ranges.tolist() == [[0, GATHERED, 2 * GATHERED], [0, 0, 0]]


@pytest.mark.parametrize("query_len", [1, 4])
def test_verifications_move_back_to_where_they_are(
    make_inputs: Callable[..., GraphInputs], query_len: int
) -> None:
    draw, inputs = random.Random(3), make_inputs(query_len, 2)
    for _ in range(30):
        batch = batch_of(draw, draw.randint(1, REQUESTS - 1), query_len)
        lags = [draw.randint(0, length - query_len) for length in batch.seq_lens]
        num_rejected = np.array(lags, np.int64)
        verified = draw.randint(1, len(num_rejected))  # others are chunks that happen to be as long
        num_rejected[verified:] = 0
        own_rejected = torch.from_numpy(num_rejected[:verified].copy())
        pending = replace(pending_of(torch.arange(3), batch, 2), num_rejected=own_rejected)
        rows = batch.num_tokens
        inputs.write(batch, rows + query_len, plan_of(rows, 0, 0), pending)
        exact = batch.rewound(num_rejected, PAGE)
        for name in ("positions", "slot_mapping"):
            null = list(range(query_len))
            due = [*getattr(exact, name).tolist(), *null]
            assert getattr(inputs, name)[: rows + query_len].tolist() == due, name
        seq_lens = inputs.seq_lens[: batch.num_requests + 1].tolist()
        assert seq_lens == [*exact.seq_lens.tolist(), query_len]


@pytest.mark.parametrize("query_len", [1, 4])
def test_null_sequences_have_the_null_slot_whatever_was_there_before_8(
    make_inputs: Callable[..., GraphInputs], query_len: int
) -> None:
    draw, accepted = random.Random(4), AcceptedDrafts(100, torch.device("cpu"))
    accepted.write(torch.arange(1, 100), torch.arange(1, 100) % 4)
    inputs = make_inputs(query_len, keeps_state=True, accepted=accepted)
    recurrent = inputs.recurrent
    assert recurrent is not None
    for _ in range(20 * HOST_BUFFERS):
        requests = draw.randint(0, REQUESTS)
        own = draw.randint(requests, REQUESTS)
        slots = [draw.randint(1, 99) for _ in range(requests)]
        batch = replace(
            batch_of(draw, requests, query_len),
            states=StateSlots(
                np.array(slots, np.int64),
                np.array([draw.random() < 0.3 for _ in range(requests)], bool),
                np.full(requests * draw.randint(0, 1), query_len - 1, np.int32),
            ),
        )
        pending = pending_of(torch.arange(3), batch)
        inputs.write(batch, own * query_len, plan_of(requests * query_len, 0, 5), pending)
        recurrent.read_accepted(own)
        of = recurrent.sequences(inputs.cu_seqlens_q[: own + 1], query_len)
        null = own - requests
        drafts = batch.states.num_drafts.tolist() or [0] * requests
        assert of.slots.tolist() == slots + [0] * null
        assert of.is_fresh.tolist() == batch.states.is_fresh.tolist() + [False] * null
        assert of.drafts is not None
        assert of.drafts.num_drafts.tolist() == drafts + [0] * null
        assert of.drafts.num_accepted.tolist() == [slot % 4 for slot in slots] + [0] * null
        assert (of.slots.dtype, of.is_fresh.dtype) == (torch.int64, torch.bool)
        assert of.query_lens_host.tolist() == [query_len] * own
    inputs.write_null(REQUESTS * query_len, plan_of(0, 0, 0))
    assert not recurrent.slots.any()
