"""PassRunner: one model's forwards in a kind of pass, from graphs or eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.transfer import all_on_device
from dp_runtime.models.causal_lm import PassInputs
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.exchange import RowExchange
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs import PassGraphs, PassOutput
from dp_runtime.runner.piecewise_graphs import PiecewiseGraphs


class PassRunner:
    """Prepares and runs the forwards of one kind of pass.

    graphs: by query length, once they are captured; stages: the model's MoE stages alone.
    """

    def __init__(self, model: PassModel, pages: PageGeometry, device: torch.device) -> None:
        self.model = model
        self.graphs: Mapping[int, PassGraphs] = {}
        self.stages: PiecewiseGraphs | None = None
        self._pages = pages
        self._device = device

    def prepare(
        self, batch: LocalBatch, exchange: RowExchange, pending: FutureTokens, place: Place
    ) -> Callable[[], PassOutput]:
        """An eager forward, its inputs on the device; MoE stages perhaps from graphs."""
        if pending.num_rejected is not None and self._device.type == "cpu":
            num_rejected = np.zeros(batch.num_requests, np.int64)
            num_rejected[: len(pending.num_rejected)] = pending.num_rejected.numpy()
            batch = batch.rewound(num_rejected, self._pages.page_size)
            pending = replace(pending, num_rejected=None)
        metadata = AttentionMetadata.build(
            batch, self._pages, place, self._device, pending.num_rejected
        )
        inputs = self._inputs(batch, pending)
        if self.stages is not None and self.stages.covers(exchange.plan):
            forward = self.stages.forward
        else:
            forward = self.model.forward
        return lambda: PassOutput(forward(inputs, metadata, exchange), None)

    def prepare_graph(
        self,
        query_len: int,
        batch: LocalBatch,
        plan: PaddingPlan,
        pending: FutureTokens,
        place: Place,
    ) -> Callable[[], PassOutput]:
        """The same from a captured graph."""
        return lambda: self.graphs[query_len].replay(batch, plan, pending, place)

    def fits_graph(self, query_len: int, batch: LocalBatch) -> bool:
        """Whether there is a graph for these rows, on this rank."""
        graphs = self.graphs.get(query_len)
        return graphs is not None and graphs.covers(batch)

    def _inputs(self, batch: LocalBatch, pending: FutureTokens) -> PassInputs:
        from_pending = batch.future_token_index >= 0
        rows, sources = from_pending.nonzero()[0], batch.future_token_index[from_pending]
        arrays = (batch.token_ids, batch.positions, batch.embed_rows, batch.embeds, rows, sources)
        inputs = all_on_device(arrays, self._device)
        token_ids, positions, embed_rows, embeds, device_rows, device_sources = inputs
        if pending.num_rejected is not None:
            count = len(pending.num_rejected)
            verified = positions[: count * batch.query_lens[0]]
            verified.view(count, -1).sub_(pending.num_rejected[:, None])
        if len(rows):
            token_ids[device_rows] = pending.token_ids[device_sources]
        return PassInputs(token_ids, positions, embed_rows, embeds, pending.hidden)
