"""SharedExpertMoe: a MoE stage beside an expert of every row, which no rank shares."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dp_runtime.layers.linear import Linear
from dp_runtime.layers.mlp import DenseMLP
from dp_runtime.layers.moe import MoeStage
from dp_runtime.parallel.row_exchange import RowExchange
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False)
class SharedExpert:
    """sigmoid(gate(x)) * mlp(x) of the rank's own rows, replicated on every rank."""

    mlp: DenseMLP
    gate: Linear  # [1, hidden]

    def __call__(self, x: Tensor) -> Tensor:
        return self.mlp(x).mul_(self.gate(x).sigmoid())

    def activation_bytes(self, rows: int) -> int:
        return self.mlp.activation_bytes(rows) + 2 * self.gate.activation_bytes(rows)

    @classmethod
    def load(
        cls, weights: WeightSource, prefix: str, hidden: int, intermediate: int
    ) -> SharedExpert:
        return cls(
            DenseMLP.load(weights, f"{prefix}.shared_expert", hidden, intermediate),
            Linear.load(weights, {f"{prefix}.shared_expert_gate": 1}, hidden),
        )


@dataclass(frozen=True, eq=False)
class SharedExpertMoe:
    """routed(x) + shared(x), [rows, hidden]; only the routed part sees the rows of other ranks."""

    routed: MoeStage
    shared: SharedExpert

    def __call__(self, x: Tensor, exchange: RowExchange) -> Tensor:
        return self.shared(x).add_(self.routed(x, exchange))

    def activation_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        shared = own_rows * self.shared.mlp.down.shape[0]
        kept = shared * self.shared.mlp.down.dtype.itemsize
        routed = self.routed.activation_bytes(own_rows, gathered_rows, padded)
        return max(self.shared.activation_bytes(own_rows), kept + routed)
