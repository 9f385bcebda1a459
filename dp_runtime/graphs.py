"""CUDA graphs of a slot's decode forward, each captured at the rank's own number of rows.

Attention, projections, norms and LM head run at the rank's own rows; only the MoE stage has the
gathered rows, and it reads the real counts on the device. Null rows between the real rows and a
graph's own rows are valid sequences of one token on the null page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_runtime.batch import LocalBatch
from dp_runtime.errors import ContractViolation
from dp_runtime.graph_buckets import GraphBuckets, GraphKey
from dp_runtime.graph_inputs import GraphInputs
from dp_runtime.layers.exchange import graph_exchange, graph_plan
from dp_runtime.metadata import AttentionMetadata, PageGeometry, Place, check_values
from dp_runtime.models import Model
from dp_runtime.padding import PaddingPlan
from dp_runtime.protocols import RowCollective
from dp_runtime.row_logits import RowLogits


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    logits: RowLogits  # [own_rows, vocab]
    metadata: AttentionMetadata


class DecodeGraphs:
    """Captures and replays the decode forward of one model.

    Capturing is an event of all ranks at once, for it warms up with real collectives. poison fills
    padded rows with NaN.
    """

    def __init__(
        self,
        model: Model,
        pages: PageGeometry,
        table_pages: int,
        collective: RowCollective,
        buckets: GraphBuckets,
        poison: bool,
        device: torch.device,
    ) -> None:
        self.buckets = buckets
        self._model = model
        self._pages = pages
        self._collective = collective
        self._poison = poison
        self._inputs = GraphInputs(buckets.most, table_pages, collective.dp_size, device)
        sizes = (buckets.most, model.config.vocab_size)
        self._logits = torch.empty(sizes, dtype=model.dtype, device=device)  # of any graph
        self._graphs: dict[GraphKey, _Captured] = {}

    def covers(self, batch: LocalBatch) -> bool:
        """Whether a batch can be replayed: one token a request, sampled from, none embedded."""
        rows = batch.num_tokens
        return (
            rows == batch.num_requests == len(batch.sample_rows)
            and rows <= self.buckets.most
            and not len(batch.embed_rows)
        )

    @property
    def count(self) -> int:
        return len(self.buckets.graph_keys())

    @torch.inference_mode()
    def capture(self, on_captured: Callable[[int], None]) -> None:
        """Capture every key; `on_captured` hears how many are done."""
        memory = torch.cuda.graph_pool_handle()
        for done, key in enumerate(self.buckets.graph_keys(), 1):
            self._graphs[key] = self._capture(key, memory)
            on_captured(done)

    def replay(
        self, batch: LocalBatch, plan: PaddingPlan, last_sampled: Tensor, place: Place
    ) -> RowLogits:
        """Run a covered batch, to the logits of its rows; valid until the next replay.

        plan: with the gathered rows of a bucket; last_sampled: the tokens that the batch's
        token_sources index.
        """
        check_values(batch, self._pages, place)
        own = self.buckets.own(batch.num_tokens)
        key = GraphKey(own, plan.own_gathered)
        captured = self._graphs.get(key)
        if captured is None or not self._inputs.owns(captured.metadata):
            raise ContractViolation(f"{place}: no graph of {key} over these inputs")
        self._inputs.write(batch, own, plan.real_rows, key.gathered_rows, last_sampled)
        captured.graph.replay()
        self._collective.watch(f"the graph of {key}")
        return captured.logits[: batch.num_tokens]

    def _capture(self, key: GraphKey, memory: Any) -> _Captured:
        inputs = self._inputs
        real = tuple(
            key.own_rows if rank == self._collective.dp_rank else key.gathered_rows
            for rank in range(self._collective.dp_size)
        )
        plan = graph_plan(self._collective, real, key.gathered_rows)
        exchange = graph_exchange(plan, self._collective, self._poison, inputs.layout)
        metadata = self._metadata(key.own_rows)
        inputs.write_null(key.own_rows, key.gathered_rows)

        def forward() -> RowLogits:
            slot_inputs = inputs.slot_inputs(key.own_rows)
            hidden = self._model.forward(slot_inputs, metadata, exchange).last
            return RowLogits.of(self._model.logits(hidden, self._logits[: key.own_rows]))

        forward()  # compiles, plans and connects: none of it may happen while capturing
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
            logits = forward()
        return _Captured(graph, logits, metadata)

    def _metadata(self, rows: int) -> AttentionMetadata:
        """Metadata over the graph's inputs; its mirrors hold the bounds that kernels may assume."""
        inputs = self._inputs
        longest = inputs.page_table.shape[1] * self._pages.page_size
        return AttentionMetadata(
            cu_seqlens_q=inputs.cu_seqlens_q[: rows + 1],
            seq_lens=inputs.seq_lens[:rows],
            page_table=inputs.page_table[:rows],
            slot_mapping=inputs.slot_mapping[:rows],
            query_lens_host=np.ones(rows, np.int32),
            seq_lens_host=np.full(rows, longest, np.int32),
            page_table_host=np.zeros((rows, inputs.page_table.shape[1]), np.int32),
            place=Place(self._collective.dp_rank, -1, "captured decode"),
        )
