"""CUDA graphs of whole passes, captured at a rank's own rows; MoE stages at the gathered ones.

Null rows between the real rows and a graph's are valid sequences on the null page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place, check_values
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.recurrent_metadata import (
    AcceptedDrafts,
    RecurrentMetadata,
    check_sequences,
)
from dp_runtime.errors import ContractViolation
from dp_runtime.models.causal_lm import Hidden, PassPlan
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import GraphBuckets, GraphKey
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.row_exchange import counts_real_rows, graph_exchange
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs.cuda_graph import GraphMemory, capture_graph
from dp_runtime.runner.graphs.graph_inputs import GraphInputs
from dp_runtime.sampling.row_logits import RowLogits


@dataclass(frozen=True, eq=False)
class PassOutput:
    """A forward's results; valid until the next forward of the same kind of pass."""

    hidden: Hidden
    logits: RowLogits | None  # of all rows, where the LM head was part of it


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: torch.cuda.CUDAGraph
    output: PassOutput  # of local_rows
    plan: PassPlan  # the graph reads its tensors at every replay


class PassGraphs:
    """Captures and replays one model's forward in a kind of pass, at one query length.

    reads_hidden: the model takes hidden states beside tokens. with_logits: graphs end with the LM
    head of all rows.
    """

    def __init__(
        self,
        model: PassModel,
        pages: PageGeometry,
        table_pages: int,
        collective: RowCollective,
        buckets: GraphBuckets,
        memory: GraphMemory,
        *,
        reads_hidden: bool,
        with_logits: bool,
        poison: bool,
        device: torch.device,
        num_state_slots: int = 0,  # of the model's recurrent layers, if it has any
        accepted_drafts: AcceptedDrafts | None = None,  # of these slots, if drafts are verified
    ) -> None:
        self.buckets = buckets
        self._model = model
        self._pages = pages
        self._collective = collective
        self._memory = memory
        self._poison = poison
        self._num_state_slots, self._accepted = num_state_slots, accepted_drafts
        rows, width = buckets.max_rows, model.hidden_size if reads_hidden else 0
        self._inputs = GraphInputs(
            buckets.max_requests, buckets.query_len, table_pages, collective.dp_size,
            torch.zeros(rows, width, dtype=model.dtype, device=device), pages.page_size,
            keeps_state=num_state_slots > 0, accepted=accepted_drafts,
        )  # fmt: skip
        sizes = (rows, model.vocab_size if with_logits else 0)
        self._logits = torch.empty(sizes, dtype=model.dtype, device=device)  # of any graph
        self._with_logits = with_logits
        self._graphs: dict[GraphKey, _Captured] = {}

    def covers(self, batch: LocalBatch) -> bool:
        rows, length = batch.num_tokens, self.buckets.query_len
        return (
            rows == batch.num_requests * length
            and rows <= self.buckets.max_rows
            and not batch.has_embeds
            and (length == 1 or bool((batch.query_lens == length).all()))
        )

    def has(self, rows: int, gathered: int) -> bool:
        return GraphKey(self.buckets.local(rows), gathered) in self._graphs

    @property
    def count(self) -> int:
        return len(self.buckets.graph_keys()) + len(self.buckets.keys_beside_prefill())

    def capture(self) -> Iterator[None]:
        """Capture what passes without prefill need, and yield after each graph.

        Warming up enters collectives of all ranks.
        """
        yield from self._capture_all(self.buckets.graph_keys())

    def capture_beside_prefill(self) -> Iterator[None]:
        """Capture the others in the same way."""
        yield from self._capture_all(self.buckets.keys_beside_prefill())

    def _capture_all(self, keys: Iterable[GraphKey]) -> Iterator[None]:
        for key in keys:
            self._graphs[key] = self._capture(key)
            yield

    def replay(
        self, batch: LocalBatch, plan: PaddingPlan, future: FutureTokens, place: Place
    ) -> PassOutput:
        check_values(batch, self._pages, place)
        if self._num_state_slots:
            check_sequences(batch, self._num_state_slots, self._accepted, place)
        rows, local_rows = batch.num_tokens, self.buckets.local(batch.num_tokens)
        key = GraphKey(local_rows, plan.rows_per_rank)
        captured = self._graphs.get(key)
        if captured is None or not self._inputs.owns(captured.plan.attention.metadata):
            raise ContractViolation(f"{place}: no graph of {key} over these inputs")
        self._inputs.write(batch, local_rows, plan, future)
        captured.graph.replay()
        self._collective.arm_watchdog(f"the graph of {key}")
        hidden, logits = captured.output.hidden, captured.output.logits
        return PassOutput(hidden.first(rows), None if logits is None else logits[:rows])

    def _capture(self, key: GraphKey) -> _Captured:
        inputs, size = self._inputs, self._collective.dp_size
        exchange = graph_exchange(
            self._collective, key.local_rows, key.gathered_rows, self._poison, inputs.row_ranges
        )
        attention = self._model.backend.plan(self._metadata(key.local_rows))
        pass_plan = PassPlan(attention, self._sequences(key.local_rows))
        counted = counts_real_rows(self._collective)
        no_rows = PaddingPlan((0,) * size, (key.gathered_rows,) * size, counted)
        inputs.write_null(key.local_rows, no_rows)

        def forward() -> PassOutput:
            pass_inputs = inputs.pass_inputs(key.local_rows)
            if inputs.recurrent is not None:
                inputs.recurrent.read_accepted(key.local_rows // inputs.query_len)
            hidden = self._model.forward(pass_inputs, pass_plan, exchange)
            if not self._with_logits:
                return PassOutput(hidden, None)
            logits = self._model.logits(hidden.last, self._logits[: key.local_rows])
            return PassOutput(hidden, RowLogits.from_logits(logits))

        graph, output = capture_graph(forward, self._memory)
        return _Captured(graph, output, pass_plan)

    def _sequences(self, rows: int) -> RecurrentMetadata | None:
        inputs, length = self._inputs, self.buckets.query_len
        if inputs.recurrent is None:
            return None
        return inputs.recurrent.sequences(inputs.cu_seqlens_q[: rows // length + 1], length)

    def _metadata(self, rows: int) -> AttentionMetadata:
        """Make metadata over the graph's inputs, with bounds on the host for kernels to plan by."""
        inputs, length = self._inputs, self.buckets.query_len
        requests, table_pages = rows // length, inputs.page_table.shape[1]
        longest = table_pages * self._pages.page_size
        return AttentionMetadata(
            cu_seqlens_q=inputs.cu_seqlens_q[: requests + 1],
            seq_lens=inputs.seq_lens[:requests],
            page_table=inputs.page_table[:requests],
            slot_mapping=inputs.slot_mapping[:rows],
            query_lens_host=np.full(requests, length, np.int32),
            seq_lens_host=np.full(requests, longest, np.int32),
            page_table_host=np.zeros((requests, table_pages), np.int32),
            place=Place(self._collective.dp_rank, -1, f"captured at {length} rows a request"),
        )
