"""Dense gated MLP: replicated on every rank, run on the rank's own rows, with no collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dp_runtime.layers.linear import Projection, load_projection
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False)
class DenseMLP:
    """down(silu(gate(x)) * up(x)), [rows, hidden] -> [rows, hidden]."""

    gate_up: Projection
    down: Projection

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(_activated(gate, up))

    def activation_bytes(self, rows: int) -> int:
        inner = self.down.shape[1]
        size = rows * self.down.dtype.itemsize
        up = self.gate_up.activation_bytes(rows)
        return up + max(2 * inner * size, inner * size + self.down.activation_bytes(rows))

    @classmethod
    def load(cls, weights: WeightSource, prefix: str, hidden: int, intermediate: int) -> DenseMLP:
        parts = {f"{prefix}.gate_proj": intermediate, f"{prefix}.up_proj": intermediate}
        return cls(
            gate_up=load_projection(weights, parts, hidden),
            down=load_projection(weights, {f"{prefix}.down_proj": hidden}, intermediate),
        )


def _activated(gate: Tensor, up: Tensor) -> Tensor:
    if not gate.is_cuda:
        return F.silu(gate) * up
    from dp_runtime.kernels.gates import multiply_gate

    return multiply_gate(up, gate, silu=True)
