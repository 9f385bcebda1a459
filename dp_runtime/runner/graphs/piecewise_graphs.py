"""PiecewiseGraphs: a model's forwards in passes in which some rank prefills, from graphs.

Launching them kernel by kernel can take the host longer than the GPU runs them.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from dp_runtime.core.device_copy import on_device
from dp_runtime.models.causal_lm import Hidden, PassInputs, PassPlan
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import PiecewiseBuckets
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.row_exchange import RowExchange, graph_exchange
from dp_runtime.runner.graphs.cuda_graph import GraphMemory
from dp_runtime.runner.graphs.forward_pieces import ForwardPieces


class PiecewiseGraphs:
    """Captures a model's forward in pieces, and runs it with them.

    reads_hidden: the model takes hidden states beside tokens; poison: padding is NaN.
    """

    def __init__(
        self,
        model: PassModel,
        collective: RowCollective,
        buckets: PiecewiseBuckets,
        memory: GraphMemory,
        *,
        reads_hidden: bool,
        poison: bool,
        device: torch.device,
    ) -> None:
        self.buckets = buckets
        self._model, self._collective, self._poison = model, collective, poison
        self._row_ranges = torch.zeros(2, collective.dp_size, dtype=torch.int32, device=device)
        self._pieces = ForwardPieces(
            model, collective, self._row_ranges, buckets.max_rows, memory,
            reads_hidden=reads_hidden, poison=poison,
        )  # fmt: skip

    @property
    def count(self) -> int:  # a forward in pieces is one
        return self._pieces.count

    def capture(self) -> Iterator[None]:
        """Capture the forward at every size, and yield after each."""
        return self._pieces.capture()

    def forward(self, inputs: PassInputs, plan: PassPlan, exchange: RowExchange) -> Hidden:
        padding, ranges = exchange.plan, self._row_ranges
        rows, gathered = len(inputs.token_ids), padding.rows_per_rank
        ranges.copy_(on_device(padding.row_ranges, ranges.device))
        if rows:
            hidden = self._pieces.forward(inputs, plan, gathered)
        else:
            none = graph_exchange(self._collective, 0, gathered, self._poison, ranges)
            hidden = self._model.forward(inputs, plan, none)
        self._collective.arm_watchdog(f"a pass of {gathered} gathered rows")
        return hidden
