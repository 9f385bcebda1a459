"""RoutingBuffer: the experts that routers chose for a rank's own rows, kept until they are read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.core.batch import Int64
from dp_runtime.core.device_copy import HostCopy, on_device
from dp_runtime.core.request import RoutingShape
from dp_runtime.parallel.padding import PaddingPlan


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

    def layer(self, index: int) -> LayerRouting:  # of the layers with experts
        return LayerRouting(self.ids[:, index], self.position)

    def copy_rows(self, rows: Int64) -> HostCopy:
        """Bring some rows to the host, [len(rows), MoE layers, top_k], as they are now."""
        return HostCopy(self.ids[on_device(rows, self.ids.device)])


@dataclass(frozen=True, eq=False)
class LayerRouting:
    ids: Tensor  # [max_rows, top_k], of the rank's own rows
    position: int  # of the rank among those that gather rows

    def write(self, chosen: Tensor, plan: PaddingPlan) -> None:
        """Take this rank's part of the choices [total_real, top_k] for all ranks' real rows."""
        first, count = sum(plan.real_rows[: self.position]), plan.real_rows[self.position]
        self.ids[:count].copy_(chosen[first : first + count])
