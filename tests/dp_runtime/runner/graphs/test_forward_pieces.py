"""A forward in pieces gives what the forward as a whole gives; graphs stand in tests/gpu."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from collectives.in_process import InProcessCollective, InProcessGroup
from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.plan import AttentionPlan
from dp_runtime.core.qk_norm_rope import QkNormRope
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan, RowEmbeds
from dp_runtime.parallel import buckets
from dp_runtime.parallel.buckets import GraphKey, PiecewiseBuckets
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.parallel.row_exchange import PaddedExchange, RowExchange, graph_exchange
from dp_runtime.runner.graphs.forward_pieces import Attend
from dp_runtime.runner.graphs.piecewise_graphs import PiecewiseGraphs
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.dp_runtime.drafts import DraftRank, on_ranks
from tests.dp_runtime.paged import CPU, metadata_of, paged_batch
from tests.dp_runtime.parallel.test_row_exchange import Counted
from tests.dp_runtime.runner.stand_ins import CountingMoe, capture_pieces

MAX_ROWS = 20
NO_MEMORY: Any = None  # nothing is captured
Lengths = Sequence[tuple[int, int]]  # query_len and seq_len of each sequence
Outcome = list[Tensor]  # a forward's hidden states, and the page pools after it
MIXED: Lengths = [(5, 9), (1, 30), (6, 6)]
INTERPRETER = Lock()  # it runs one kernel at a time


def write(own: KvWriter, qkv: Tensor, rotation: QkNormRope, plan: AttentionPlan) -> Tensor:
    if not len(qkv):
        return qkv[:, : plan.spec.num_heads]
    with INTERPRETER:
        return own.write_fused(qkv, rotation, plan)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Append by the kernel that leaves rows without a slot out; stages count rows on the device."""
    monkeypatch.setattr(KvWriter, "write", write)
    monkeypatch.setattr("dp_runtime.layers.moe_kernels.MOE_KERNELS", {"torch": CountingMoe})


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """4, 16 and 20 gathered rows; pieces of 8, 16 and 20."""
    monkeypatch.setattr(buckets, "SMALLEST", 4)
    monkeypatch.setattr(buckets, "MIN_PIECES", 8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("pieces")))


class Rank:
    """One rank's rows of a pass, and the two ways to run them."""

    def __init__(
        self, checkpoint: Path, collective: RowCollective, drafts: bool, lengths: Lengths
    ) -> None:
        rank = DraftRank(checkpoint, None, collective, len(lengths))
        self.model: Any = rank.draft if drafts else rank.target
        self.collective, self.drafts = collective, drafts
        self.rows = sum(query_len for query_len, _ in lengths)
        tokens = torch.randint(3, 90, (self.rows,)).tolist()
        batch = paged_batch(lengths, rank.table, 8, tokens)
        hidden = torch.randn(self.rows, self.model.hidden_size if drafts else 0)
        positions = torch.from_numpy(batch.positions.copy())
        self.inputs = PassInputs(torch.tensor(tokens, dtype=torch.int64), positions, hidden)
        self._metadata = metadata_of(batch, rank.num_pages, 8)

    @property
    def plan(self) -> PassPlan:
        return PassPlan(self.model.backend.plan(self._metadata))

    def with_embeds(self) -> PassInputs:
        """Replace the first and last token, as an image's, which has places in three axes."""
        rows = torch.tensor([0, self.rows - 1])
        embeds = RowEmbeds(rows, torch.randn(2, self.model.hidden_size, dtype=torch.float64))
        positions = torch.stack([self.inputs.positions + axis for axis in range(3)])
        return replace(self.inputs, positions=positions, embeds=embeds)

    def eager(self, real: tuple[int, ...], inputs: PassInputs) -> Outcome:
        """Run the whole forward; its result, and the pools after it."""
        padding = PaddingPlan.for_mode(PaddingMode.MAX_LEN, real)
        return self.run(inputs, self.model, PaddedExchange(padding, self.collective, False))

    def by_graphs(
        self, graphs: PiecewiseGraphs, real: tuple[int, ...], inputs: PassInputs
    ) -> Outcome:
        padding = PaddingPlan(real, (graphs.buckets.gathered(max(real)),) * len(real))
        return self.run(inputs, graphs, PaddedExchange(padding, self.collective, False))

    def run(self, inputs: PassInputs, model: Any, exchange: RowExchange) -> Outcome:
        pools = [cache.pool for cache in self.model.backend._caches.values()]
        for pool in pools:
            pool.zero_()
        found = model.forward(inputs, self.plan, exchange)
        return [tensor.clone() for tensor in (*found, *pools)]

    def graphs(self) -> PiecewiseGraphs:
        return PiecewiseGraphs(
            self.model, self.collective, PiecewiseBuckets(MAX_ROWS), NO_MEMORY,
            reads_hidden=self.drafts, poison=True, device=CPU,
        )  # fmt: skip


def check(found: Outcome, due: Outcome) -> None:
    for one, other in zip(found, due, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    for pool in found[len(Hidden._fields) :]:
        assert not pool[0].any(), "null rows write nothing, not even to the null page"


def warm_up(graphs: PiecewiseGraphs, key: GraphKey) -> None:
    """Keep what `capture` would have recorded; every rank enters the stages of the key."""
    pieces = graphs._pieces
    assert key in pieces.buckets.keys
    paused = capture_pieces(pieces, key)
    assert [type(cut) for cut in paused.cuts] == [Attend] * pieces._model.num_moe_layers
    pieces._captured[key] = paused  # type: ignore[assignment]
    pieces._inputs.q.fill_(torch.nan)
    pieces._inputs.attended.fill_(torch.nan)  # what lies beyond the real rows must not matter


@pytest.mark.parametrize("drafts", [False, True])
def test_pieces_give_what_the_whole_forward_gives(checkpoint: Path, drafts: bool) -> None:
    with torch.inference_mode():
        rank = Rank(checkpoint, InProcessGroup(1, 30.0).collective(0), drafts, MIXED)
        real, graphs = (rank.rows,), rank.graphs()
        key = graphs._pieces.buckets.key(rank.rows, graphs.buckets.gathered(rank.rows))
        assert key.local_rows == key.gathered_rows > rank.rows, "alone; there are null rows"
        warm_up(graphs, key)
        for inputs in (rank.inputs, rank.with_embeds(), rank.inputs):
            check(rank.by_graphs(graphs, real, inputs), rank.eager(real, inputs))
            positions = graphs._pieces._inputs.positions[:, : rank.rows]
            assert torch.equal(positions, inputs.positions.expand(3, -1))


def test_embeddings_change_what_a_forward_gives(checkpoint: Path) -> None:
    with torch.inference_mode():
        rank = Rank(checkpoint, InProcessGroup(1, 30.0).collective(0), False, MIXED)
        plain, changed = (
            rank.eager((rank.rows,), inputs)[0] for inputs in (rank.inputs, rank.with_embeds())
        )
    assert not torch.allclose(plain[0], changed[0], atol=0.1)


PREFILL: Lengths = [(18, 40), (1, 5)]
DECODES: Lengths = [(1, 9), (1, 30), (1, 1)]
# Each rank's rows, whether it replays pieces, and the sizes that serve it.
BESIDE: dict[str, tuple[list[Lengths], list[GraphKey | None]]] = {
    "the largest, beside decodes": ([PREFILL, DECODES], [GraphKey(20, 20), None]),
    "not the largest": ([[(5, 9)], PREFILL], [GraphKey(8, 20), GraphKey(20, 20)]),
    "beside more decodes": ([DECODES, MIXED], [GraphKey(8, 16), None]),
    "both prefill": ([MIXED, [(7, 41)]], [GraphKey(16, 16), GraphKey(8, 16)]),
    "beside idle ranks": ([[], [(3, 9)], []], [None, GraphKey(4, 4), None]),
}


@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("drafts", [False, True])
def test_pieces_of_a_rank_meet_whatever_the_others_run(
    checkpoint: Path, name: str, drafts: bool
) -> None:
    """Others replay a graph of the whole pass, or pieces of another size."""
    all_lengths, keys = BESIDE[name]
    real = tuple(sum(query_len for query_len, _ in lengths) for lengths in all_lengths)
    gathered = PiecewiseBuckets(MAX_ROWS).gathered(max(real))

    def run(inner: RowCollective) -> list[int]:
        assert isinstance(inner, InProcessCollective)
        torch.manual_seed(inner.dp_rank)
        collective = Counted(inner)
        key = keys[inner.dp_rank]
        rank = Rank(checkpoint, collective, drafts, all_lengths[inner.dp_rank])
        due = rank.eager(real, rank.inputs)
        graphs = rank.graphs()
        row_ranges = torch.zeros(2, len(real), dtype=torch.int32)
        whole = graph_exchange(collective, rank.rows, gathered, True, row_ranges)
        if key is None:
            rank.run(rank.inputs, rank.model, whole)
        else:
            assert graphs._pieces.buckets.key(rank.rows, gathered) == key
            warm_up(graphs, key)
        row_ranges.copy_(torch.from_numpy(PaddingPlan(real, (gathered,) * len(real)).row_ranges))
        if key is None and rank.rows:
            found = rank.run(rank.inputs, rank.model, whole)
        else:
            found = rank.by_graphs(graphs, real, rank.inputs)
        check(found, due)
        assert all(collective.poisoned)
        return collective.crossed

    stages = 1 if drafts else 2
    for dp_rank, crossed in enumerate(on_ranks(len(real), run)):
        of_warming_up, of_pass = [0, 0] * stages, [real[dp_rank], sum(real)] * stages
        assert crossed == of_warming_up + of_pass, "only real rows meet"
