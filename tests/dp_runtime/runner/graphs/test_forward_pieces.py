"""A forward in pieces gives what the forward as a whole gives; graphs stand in tests/gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from collectives.in_process import InProcessGroup
from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan, RowEmbeds
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import PieceBuckets
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange
from dp_runtime.runner.graphs import forward_pieces
from dp_runtime.runner.graphs.forward_pieces import Attend, Cut, ForwardPieces, RunStage, StageRows
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.dp_runtime.drafts import DraftRank
from tests.dp_runtime.paged import metadata_of, paged_batch
from tests.dp_runtime.runner.paused_forward import PausedForward

MAX_ROWS = 40
NO_MEMORY: Any = None  # nothing is captured
LENGTHS = [(5, 9), (1, 30), (12, 12)]  # query_len and seq_len of each sequence
ROWS = sum(query_len for query_len, _ in LENGTHS)


@dataclass
class Stage:
    """Runs a stage on the first rows; what lies beyond them must not matter."""

    stage: Any
    rows: StageRows
    exchange: PaddedExchange

    def replay(self, rows: int, gathered: int) -> None:
        self.rows.rows[rows:] = torch.nan
        self.rows.sums.fill_(torch.nan)
        self.rows.sums[:rows] = self.stage(self.rows.rows[:rows], self.exchange)


@pytest.fixture(autouse=True)
def fused_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Append by the kernel that a GPU runs, which leaves rows without a slot out."""
    monkeypatch.setattr(KvWriter, "write", KvWriter.write_fused)


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[DraftRank]:
    with torch.inference_mode():
        path = add_mtp(tiny_checkpoint(tmp_path))
        yield DraftRank(path, None, InProcessGroup(1, 30.0).collective(0), len(LENGTHS))


@contextmanager
def zeroed(model: PassModel) -> Iterator[list[Tensor]]:
    pools = [cache.pool for cache in model.backend._caches.values()]
    for pool in pools:
        pool.zero_()
    yield pools


def inputs_of(rank: DraftRank, hidden_size: int) -> tuple[PassInputs, Any]:
    tokens = torch.randint(3, 90, (ROWS,)).tolist()
    batch = paged_batch(LENGTHS, rank.table, 8, tokens)
    hidden = torch.randn(ROWS, hidden_size)
    positions = torch.from_numpy(batch.positions.copy())
    inputs = PassInputs(torch.tensor(tokens), positions, hidden)
    return inputs, metadata_of(batch, rank.num_pages, 8)


@pytest.mark.parametrize("drafts", [False, True])
def test_pieces_give_what_the_whole_forward_gives(rank: DraftRank, drafts: bool) -> None:
    model: Any = rank.draft if drafts else rank.target
    inputs, metadata = inputs_of(rank, model.hidden_size if drafts else 0)
    padding = PaddingPlan.for_mode(PaddingMode.MAX_LEN, (ROWS,))
    exchange = PaddedExchange(padding, rank.collective, False)
    with torch.inference_mode():
        with zeroed(model) as pools:
            due = model.forward(inputs, PassPlan(model.backend.plan(metadata)), exchange)
            kept = [pool.clone() for pool in pools]
        with zeroed(model) as pools:
            rows = StageRows(
                torch.zeros(MAX_ROWS, model.hidden_size),
                torch.zeros(MAX_ROWS, model.hidden_size),
                torch.zeros(2, 1, dtype=torch.int32),
            )
            buckets = PieceBuckets(MAX_ROWS)
            pieces = ForwardPieces(model, buckets, rows, NO_MEMORY, reads_hidden=drafts)
            stages = [Stage(stage, rows, exchange) for stage in model.moe_stages]
            plan = PassPlan(model.backend.plan(metadata))
            found = forward_by(pieces, inputs, plan, stages)
        torch.testing.assert_close(found.last, due.last, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            found.aux_hidden_states, due.aux_hidden_states, atol=1e-5, rtol=1e-5
        )
        for pool, expected in zip(pools, kept):
            torch.testing.assert_close(pool, expected, atol=1e-5, rtol=1e-5)
            assert not pool[0].any(), "null rows write nothing, not even to the null page"


def forward_by(pieces: ForwardPieces, inputs: PassInputs, plan: PassPlan, stages: Any) -> Hidden:
    """Run what `capture` would have recorded of each bucket."""
    assert pieces.covers(inputs)
    bucket = pieces.buckets.of(ROWS)
    assert bucket > ROWS, "there are null rows"
    cuts = list[Cut]()
    pieces._inputs.slot_mapping.fill_(forward_pieces.NOWHERE)
    pieces.cut_forward(bucket, cuts.append)
    kinds = [type(cut) for cut in cuts]
    assert kinds == [Attend, RunStage] * pieces._model.num_moe_layers
    pieces._captured[bucket] = PausedForward(pieces, bucket, cuts)  # type: ignore[assignment]
    return pieces.forward(inputs, plan, stages, 64)


def test_a_bucket_holds_the_rows_without_much_waste() -> None:
    buckets = PieceBuckets(2048)
    assert buckets.sizes[0] == 2048
    for rows in range(1, 2049):
        bucket = buckets.of(rows)
        assert rows <= bucket
        assert bucket < max(2 * rows, 65)
        assert rows <= 256 or bucket <= 1.5 * rows
    assert PieceBuckets(0).sizes == ()
    assert PieceBuckets(1).sizes == (1,)
    assert PieceBuckets(300).sizes == (300, 256, 128, 64)


def test_embeddings_and_no_rows_are_not_for_pieces(rank: DraftRank) -> None:
    model = rank.target
    size = (MAX_ROWS, model.hidden_size)
    rows = StageRows(torch.zeros(size), torch.zeros(size), torch.zeros(2, 1))
    pieces = ForwardPieces(model, PieceBuckets(MAX_ROWS), rows, NO_MEMORY, reads_hidden=False)
    none, some = torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    assert pieces.covers(PassInputs(some, some))
    embeds = RowEmbeds(some[:1], torch.zeros(1, model.hidden_size))
    assert not pieces.covers(PassInputs(some, some, embeds=embeds))
    assert not pieces.covers(PassInputs(none, none))
    many = torch.zeros(MAX_ROWS + 1, dtype=torch.int64)
    assert not pieces.covers(PassInputs(many, many))
