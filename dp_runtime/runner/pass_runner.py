"""PassRunner: one model's forwards in a kind of pass, from graphs or eager."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.device_copy import all_on_device
from dp_runtime.core.recurrent_metadata import AcceptedDrafts, RecurrentMetadata
from dp_runtime.flight.exchange import RecordedExchange
from dp_runtime.flight.recorder import FlightRecorder
from dp_runtime.layers.routing_buffer import RoutingBuffer
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan, RowEmbeds
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPlan
from dp_runtime.parallel.row_exchange import PaddedExchange
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs.pass_graphs import PassGraphs, PassOutput
from dp_runtime.runner.graphs.piecewise_graphs import PiecewiseGraphs
from dp_runtime.runner.step_timer import PassTimer


@dataclass(frozen=True, eq=False, kw_only=True)
class PassRunner:
    """Runs one kind of pass as the agreed plan says; it decides nothing."""

    model: PassModel
    pages: PageGeometry
    collective: RowCollective
    poison: bool  # fill padded rows with NaN
    flight: FlightRecorder
    device: torch.device
    image_features: Tensor  # [slots, hidden]; without slots where images are not served
    num_state_slots: int = 0  # of the model's recurrent layers, if it has any
    accepted_drafts: AcceptedDrafts | None = None  # of these slots, if drafts are verified
    routing: RoutingBuffer | None = None  # of the model's routers, if it has one
    graphs: Mapping[int, PassGraphs] = field(default_factory=dict)  # by query length
    piecewise: PiecewiseGraphs | None = None

    def run(
        self,
        plan: ExecutionPlan,
        batch: LocalBatch,
        future: FutureTokens,
        place: Place,
        timer: PassTimer,
        fits_graph: bool,  # what this rank voted
    ) -> PassOutput:
        match plan.mode:
            case ExecutionMode.EMPTY:
                return PassOutput(Hidden(future.hidden, future.hidden), None)
            case ExecutionMode.GRAPH:
                return self.graphs[plan.query_len].replay(batch, plan.padding, future, place)
            case ExecutionMode.PIECEWISE if fits_graph and self._has_graph(plan, batch):
                # Another rank prefills, not this one.
                return self.graphs[plan.query_len].replay(batch, plan.padding, future, place)
            case ExecutionMode.PIECEWISE:
                assert self.piecewise is not None, "agreed on pieces that are not captured"
                forward = self.piecewise.forward
            case ExecutionMode.EAGER:
                forward = self.model.forward
        inputs, prepared = self._prepare(batch, future, place)
        padded = PaddedExchange(plan.padding, self.collective, self.poison)
        exchange = RecordedExchange(padded, self.flight)
        timer.end_prepare()
        if not plan.replays_routing:
            return PassOutput(forward(inputs, prepared, exchange), None)
        assert plan.mode is ExecutionMode.EAGER, f"experts are replayed in a pass of {plan.mode}"
        assert self.routing is not None, "experts are replayed through a buffer"
        with self.routing.replaying(batch, padded, self.model.dtype):
            return PassOutput(forward(inputs, prepared, exchange), None)

    def fits_graph(self, query_len: int, batch: LocalBatch) -> bool:
        """Tell whether this rank has a graph for these rows."""
        graphs = self.graphs.get(query_len)
        return graphs is not None and graphs.covers(batch)

    def _has_graph(self, plan: ExecutionPlan, batch: LocalBatch) -> bool:
        return self.graphs[plan.query_len].has(batch.num_tokens, plan.padding.rows_per_rank)

    def _prepare(
        self, batch: LocalBatch, future: FutureTokens, place: Place
    ) -> tuple[PassInputs, PassPlan]:
        if future.num_rejected is not None and self.device.type == "cpu":
            num_rejected = np.zeros(batch.num_requests, np.int64)
            num_rejected[: len(future.num_rejected)] = future.num_rejected.numpy()
            batch = batch.rewound(num_rejected, self.pages.page_size)
            future = replace(future, num_rejected=None)
        metadata = AttentionMetadata.build(
            batch, self.pages, place, self.device, future.num_rejected
        )
        recurrent = None
        if self.num_state_slots:
            own = batch, self.num_state_slots, place, self.device, self.accepted_drafts
            recurrent = RecurrentMetadata.build(*own)
        plan = PassPlan(self.model.backend.plan(metadata), recurrent)
        return pass_inputs(batch, future, self.device, self.image_features), plan


def pass_inputs(
    batch: LocalBatch, future: FutureTokens, device: torch.device, image_features: Tensor
) -> PassInputs:
    """Bring a batch's tokens and positions to the device, and fill in what only it knows.

    image_features [slots, hidden], there already.
    """
    from_future = batch.future_token_index >= 0
    rows, sources = from_future.nonzero()[0], batch.future_token_index[from_future]
    arrays = batch.token_ids, batch.rotary_positions, rows, sources
    token_ids, positions, *of_future = all_on_device(arrays, device)
    if future.num_rejected is not None:
        count = len(future.num_rejected)
        verified = positions[..., : count * batch.query_lens[0]]
        verified.view(*verified.shape[:-1], count, -1).sub_(future.num_rejected[:, None])
    if len(rows):
        device_rows, device_sources = of_future
        token_ids[device_rows] = future.token_ids[device_sources]
    embeds = row_embeds(batch, device, image_features) if batch.has_embeds else None
    return PassInputs(token_ids, positions, future.hidden, embeds)


def row_embeds(batch: LocalBatch, device: torch.device, image_features: Tensor) -> RowEmbeds:
    """Bring a batch's embeddings to the device, and find those of its images there."""
    rows = np.concatenate((batch.embeds.rows, batch.images.rows))
    arrays = rows, batch.embeds.values, batch.images.values
    there, values, slots = all_on_device(arrays, device)
    if len(slots):
        features = image_features[slots]
        values = torch.cat((values.to(features.dtype), features)) if len(values) else features
    return RowEmbeds(there, values)
