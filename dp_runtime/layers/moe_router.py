"""Router: the choice of each row's experts, and their weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.layers.linear import Linear
from dp_runtime.layers.routing_buffer import LayerRouting


@dataclass(frozen=True, eq=False)
class Router:
    """Softmax over all experts in float32, then the top k, replicated on every rank."""

    gate: Linear
    top_k: int
    renormalize: bool
    routing: LayerRouting | None = None  # where choices are left, if anybody may ask for them

    def __call__(self, rows: Tensor, replay: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Route rows [n, hidden] -> weights [n, k] float32 and expert ids [n, k] int64.

        replay: ids [n, k] int64 that are taken whatever the rows say; -1 where they decide.
        """
        scores = self.gate(rows).softmax(-1, dtype=torch.float32)
        weights, ids = scores.topk(self.top_k, -1)
        if replay is not None:
            ids = torch.where(replay >= 0, replay, ids)
            weights = scores.gather(-1, ids)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids

    @property
    def dtype(self) -> torch.dtype:
        return self.gate.weight.dtype

    def activation_bytes(self, rows: int) -> int:
        logits = self.gate.activation_bytes(rows)
        probabilities = rows * self.gate.weight.shape[0] * 4
        return probabilities + max(logits, rows * self.top_k * (4 + 8 + 4))
