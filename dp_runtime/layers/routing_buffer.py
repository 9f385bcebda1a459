"""RoutingBuffer: the experts that routers chose for a rank's own rows, kept until they are read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import Int64, LocalBatch
from dp_runtime.core.device_copy import HostCopy, on_device
from dp_runtime.core.request import RoutingShape
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.row_exchange import RowExchange

WORDS = 8  # int16 in 16 bytes, in which rows travel


class RoutingBuffer:
    """Written by every forward, from graphs too; it has what the experts were run by.

    NOTE: routing the own rows again would not do: other sizes round, and settle ties, differently.
    """

    def __init__(
        self,
        shape: RoutingShape,
        max_rows: int,
        position: int,  # of the rank among those that gather rows
        device: torch.device,
    ) -> None:
        dtype = torch.from_numpy(shape.dtype.type([0])).dtype
        self.position = position
        self.ids = torch.zeros(max_rows, *shape.of_token, dtype=dtype, device=device)
        self.replay: Tensor | None = None  # [total_real, layers, top_k] int64, in a pass with some

    def layer(self, index: int) -> LayerRouting:  # of the layers with experts
        return LayerRouting(self, index)

    @contextmanager
    def replaying(
        self, batch: LocalBatch, exchange: RowExchange, dtype: torch.dtype
    ) -> Iterator[None]:
        """Have the experts that rows of any rank bring taken in a forward; all ranks gather them.

        dtype: of activations, as which they travel.
        """
        width, shape, device = self.ids[0].numel(), self.ids.shape[1:], self.ids.device
        own = np.full((batch.num_tokens, -(-width // WORDS) * WORDS), -1, np.int16)
        if len(batch.replays):
            own[batch.replays.rows, :width] = batch.replays.values.reshape(-1, width)
        gathered = exchange.gather(on_device(own, device).view(dtype)).view(torch.int16)
        if exchange.plan.real_index is not None:
            gathered = gathered[on_device(exchange.plan.real_index.numpy(), device)]
        self.replay = gathered[:, :width].reshape(-1, *shape).long()
        try:
            yield
        finally:
            self.replay = None

    def copy_rows(self, rows: Int64) -> HostCopy:
        """Bring some rows to the host, [len(rows), MoE layers, top_k], as they are now."""
        return HostCopy(self.ids[on_device(rows, self.ids.device)])


@dataclass(frozen=True, eq=False)
class LayerRouting:
    buffer: RoutingBuffer
    index: int  # of the layer, among those with experts

    @property
    def ids(self) -> Tensor:  # [max_rows, top_k], of the rank's own rows
        return self.buffer.ids[:, self.index]

    @property
    def position(self) -> int:
        return self.buffer.position

    @property
    def replay(self) -> Tensor | None:  # [total_real, top_k] int64
        replay = self.buffer.replay
        return None if replay is None else replay[:, self.index]

    def write(self, chosen: Tensor, plan: PaddingPlan) -> None:
        """Take this rank's part of the choices [total_real, top_k] for all ranks' real rows."""
        first, count = sum(plan.real_rows[: self.position]), plan.real_rows[self.position]
        self.ids[:count].copy_(chosen[first : first + count])
