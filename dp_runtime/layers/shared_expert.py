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
    """mlp(x) of the rank's own rows, and how much it counts; replicated on every rank."""

    mlp: DenseMLP
    gate: Linear  # [1, hidden]

    def add(self, out: Tensor, routed: Tensor, x: Tensor) -> Tensor:
        """Compute routed + sigmoid(gate(x)) * out, an own result of the mlp, in its place."""
        if not x.is_cuda:
            return out.mul_(self.gate(x).sigmoid()).add_(routed)
        from dp_runtime.kernels.gates import add_gated

        return add_gated(out, routed, x, self.gate.weight)

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
    """routed(x) + sigmoid(gate(x)) * mlp(x), [rows, hidden]; routed sees rows of other ranks."""

    routed: MoeStage
    shared: SharedExpert

    def __call__(self, x: Tensor, exchange: RowExchange) -> Tensor:
        own = self.shared.mlp(x)
        return self.shared.add(own, self.routed(x, exchange), x)

    def activation_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        shared = own_rows * self.shared.mlp.down.shape[0]
        kept = shared * self.shared.mlp.down.dtype.itemsize
        routed = self.routed.activation_bytes(own_rows, gathered_rows, padded)
        return max(self.shared.mlp.activation_bytes(own_rows), kept + routed)
