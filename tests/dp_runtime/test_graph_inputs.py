"""What graphs read after each write, with plain memory in place of pinned memory."""

import random
from typing import Any

import numpy as np
import pytest
import torch

from dp_runtime import graph_inputs
from dp_runtime.batch import LocalBatch
from dp_runtime.graph_inputs import HOST_BUFFERS, GraphInputs

ROWS, TABLE_PAGES, PAGE, DP_SIZE = 8, 6, 4, 3
CPU = torch.device("cpu")


class Done:
    """The event of a copy that never takes time."""

    def synchronize(self) -> None: ...

    def record(self) -> None: ...


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> GraphInputs:
    def plain(words: int, shapes: dict[str, tuple[int, ...]]) -> Any:
        memory = torch.zeros(words, dtype=torch.int32)
        fields = {n: part.numpy() for n, part in graph_inputs._split(memory, shapes).items()}
        return graph_inputs._HostBuffer(memory, fields, Done())  # type: ignore[arg-type]

    monkeypatch.setattr(graph_inputs, "_host_buffer", plain)
    return GraphInputs(ROWS, TABLE_PAGES, DP_SIZE, CPU)


def decodes(draw: random.Random, rows: int) -> LocalBatch:
    """Decodes of any lengths over any pages."""
    width = draw.randint(1, TABLE_PAGES)
    seq_lens = np.array([draw.randint(1, width * PAGE) for _ in range(rows)], np.int32)
    used = -(-seq_lens // PAGE)
    width = int(used.max(initial=0))
    table = np.array([[draw.randint(1, 99) for _ in range(width)] for _ in range(rows)], np.int32)
    table = table.reshape(rows, width) * (np.arange(width) < used[:, None])
    positions = seq_lens.astype(np.int64) - 1
    pages = table[np.arange(rows), positions // PAGE].astype(np.int64)
    return LocalBatch(
        token_ids=np.array([draw.randint(0, 500) for _ in range(rows)], np.int64),
        token_sources=np.array([draw.randint(-1, ROWS - 1) for _ in range(rows)], np.int64),
        positions=positions,
        slot_mapping=pages * PAGE + positions % PAGE,
        request_ids=np.arange(rows),
        query_lens=np.ones(rows, np.int32),
        seq_lens=seq_lens,
        page_table=table.astype(np.int32),
        sample_rows=np.arange(rows),
    )


def test_every_write_leaves_the_batch_and_null_rows_whatever_was_there_before(
    inputs: GraphInputs,
) -> None:
    draw = random.Random(0)
    for _ in range(40 * HOST_BUFFERS):
        rows = draw.randint(0, ROWS)
        own_rows = draw.randint(rows, ROWS)
        batch = decodes(draw, rows)
        sampled = torch.arange(draw.randint(1, ROWS)) + 1000
        inputs.write(batch, own_rows, (rows, 0, 5), 8, sampled)
        null = own_rows - rows
        for name, value in (("token_ids", 0), ("token_sources", -1), ("positions", 0),
                            ("seq_lens", 1)):  # fmt: skip
            expected = [*getattr(batch, name).tolist(), *[value] * null]
            assert getattr(inputs, name)[:own_rows].tolist() == expected, name
        table = np.zeros((own_rows, TABLE_PAGES), np.int32)
        table[:rows, : batch.page_table.shape[1]] = batch.page_table
        assert inputs.page_table[:own_rows].tolist() == table.tolist()
        assert inputs.layout.tolist() == [[0, 8, 16], [rows, 0, 5]]
        inputs.slot_inputs(own_rows)
        slots = [*batch.slot_mapping.tolist(), *[0] * null]
        assert inputs.slot_mapping[:own_rows].tolist() == slots


def test_pending_tokens_come_from_the_last_step(inputs: GraphInputs) -> None:
    batch = decodes(random.Random(1), 3)
    sources = np.array([1, -1, 0], np.int64)
    batch = LocalBatch(**{**vars(batch), "token_sources": sources})
    inputs.write(batch, 4, (3, 0, 0), 4, torch.tensor([70, 71]))
    expected = [71, int(batch.token_ids[1]), 70, 0]
    assert inputs.slot_inputs(4).token_ids.tolist() == expected


def test_null_rows_alone_are_written_over_a_batch(inputs: GraphInputs) -> None:
    for _ in range(HOST_BUFFERS):
        inputs.write(decodes(random.Random(2), ROWS), ROWS, (8, 8, 8), 8, torch.arange(8))
    inputs.write_null(5, 8)
    assert inputs.seq_lens[:5].tolist() == [1] * 5
    assert not inputs.page_table[:5].any()
    assert not inputs.positions[:5].any()
    assert inputs.layout.tolist() == [[0, 8, 16], [0, 0, 0]]
