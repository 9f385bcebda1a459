"""SlotRunner: one model's forwards in a kind of slot, from graphs or eager."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import torch

from dp_runtime.batch import LocalBatch
from dp_runtime.graphs import SlotGraphs, SlotOutput
from dp_runtime.layers.moe import RowExchange
from dp_runtime.metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.models import SlotInputs, SlotModel
from dp_runtime.padding import PaddingPlan
from dp_runtime.pending import Pending
from dp_runtime.stage_graphs import StageGraphs
from dp_runtime.transfer import all_on_device


class SlotRunner:
    """Prepares and runs the forwards of one kind of slot.

    graphs: by query length, once they are captured; stages: the model's MoE stages alone.
    """

    def __init__(self, model: SlotModel, pages: PageGeometry, device: torch.device) -> None:
        self.model = model
        self.graphs: Mapping[int, SlotGraphs] = {}
        self.stages: StageGraphs | None = None
        self._pages = pages
        self._device = device

    def prepare(
        self, batch: LocalBatch, exchange: RowExchange, pending: Pending, place: Place
    ) -> Callable[[], SlotOutput]:
        """An eager forward, its inputs on the device; MoE stages perhaps from graphs."""
        if pending.lag is not None and self._device.type == "cpu":
            lag = np.zeros(batch.num_requests, np.int64)
            lag[: len(pending.lag)] = pending.lag.numpy()  # nothing here has to be waited for
            batch, pending = batch.behind(lag, self._pages.page_size), replace(pending, lag=None)
        metadata = AttentionMetadata.build(batch, self._pages, place, self._device, pending.lag)
        inputs = self._inputs(batch, pending)
        if self.stages is not None and self.stages.covers(exchange.plan):
            forward = self.stages.forward
        else:
            forward = self.model.forward
        return lambda: SlotOutput(forward(inputs, metadata, exchange), None)

    def prepare_graph(
        self, query_len: int, batch: LocalBatch, plan: PaddingPlan, pending: Pending, place: Place
    ) -> Callable[[], SlotOutput]:
        """The same from a captured graph."""
        return lambda: self.graphs[query_len].replay(batch, plan, pending, place)

    def fits_graph(self, query_len: int, batch: LocalBatch) -> bool:
        """Whether there is a graph for these rows, on this rank."""
        graphs = self.graphs.get(query_len)
        return graphs is not None and graphs.covers(batch)

    def _inputs(self, batch: LocalBatch, pending: Pending) -> SlotInputs:
        from_pending = batch.token_sources >= 0
        rows, sources = from_pending.nonzero()[0], batch.token_sources[from_pending]
        arrays = (batch.token_ids, batch.positions, batch.embed_rows, batch.embeds, rows, sources)
        inputs = all_on_device(arrays, self._device)
        token_ids, positions, embed_rows, embeds, device_rows, device_sources = inputs
        if pending.lag is not None:
            count = len(pending.lag)
            positions[: count * batch.query_lens[0]].view(count, -1).sub_(pending.lag[:, None])
        if len(rows):
            token_ids[device_rows] = pending.token_ids[device_sources]
        return SlotInputs(token_ids, positions, embed_rows, embeds, pending.hidden)
