"""Dense gated MLP: replicated on every rank, run on the rank's own rows, with no collective."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dp_runtime.layers.linear import Linear
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False)
class DenseMLP:
    """down(silu(gate(x)) * up(x)), [rows, hidden] -> [rows, hidden]."""

    gate_up: Linear
    down: Linear

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)

    def activation_bytes(self, rows: int) -> int:
        hidden, inner = self.down.weight.shape
        width = 2 * inner + max(2 * inner, inner + hidden)
        return rows * width * self.down.weight.dtype.itemsize

    @classmethod
    def load(cls, weights: WeightSource, prefix: str, hidden: int, intermediate: int) -> DenseMLP:
        parts = {f"{prefix}.gate_proj": intermediate, f"{prefix}.up_proj": intermediate}
        return cls(
            gate_up=Linear.load(weights, parts, hidden),
            down=Linear.load(weights, {f"{prefix}.down_proj": hidden}, intermediate),
        )
