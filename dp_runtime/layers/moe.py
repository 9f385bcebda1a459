"""The MoE stage: the one place where ranks exchange rows, and where rows are padded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.layers.experts import Experts, ExpertShard, fused_experts
from dp_runtime.layers.linear import Linear
from dp_runtime.padding import PaddingPlan, pad, strip
from dp_runtime.protocols import RowCollective

__all__ = [
    "ExpertShard",
    "MoeStage",
    "RankSharding",
    "Router",
    "RowExchange",
    "fused_experts",
]


@dataclass(frozen=True)
class RankSharding:
    """How experts are split over the ranks ("ep" or "tp"), and which rank this is."""

    moe_sharding: str
    dp_rank: int
    dp_size: int

    def shard(self, num_experts: int, intermediate_size: int) -> ExpertShard:
        return ExpertShard.of(
            self.moe_sharding, self.dp_rank, self.dp_size, num_experts, intermediate_size
        )


@dataclass(frozen=True, eq=False)
class RowExchange:
    """What one slot's MoE stages need to exchange rows; handed down through forward."""

    plan: PaddingPlan
    collective: RowCollective
    poison: bool  # fill padded rows with NaN


@dataclass(frozen=True, eq=False)
class Router:
    """Softmax over all experts in float32, then the top k, replicated on every rank."""

    gate: Linear
    top_k: int
    renormalize: bool

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """rows [n, hidden] -> weights [n, k] float32 and expert ids [n, k] int64."""
        weights, ids = self.gate(rows).softmax(-1, dtype=torch.float32).topk(self.top_k, -1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids

    def activation_bytes(self, rows: int) -> int:
        """Most bytes a call allocates at once, its result included."""
        logits = self.gate.activation_bytes(rows)
        probabilities = rows * self.gate.weight.shape[0] * 4
        return probabilities + max(logits, rows * self.top_k * (4 + 8 + 4))


@dataclass(frozen=True, eq=False)
class MoeStage:
    """strip(reduce_scatter(experts(all_gather(pad(x))))), [rows, hidden] -> [rows, hidden].

    Padded rows enter neither routing nor a product: their content can't reach a result.
    """

    router: Router
    experts: Experts

    def activation_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        """Most bytes a call allocates at once, its result included.

        padded: some gathered rows are not real, so real ones are copied out and their sums back.
        """
        row = self.experts.down.shape[1] * self.experts.down.dtype.itemsize
        copied = gathered_rows * row if padded else 0
        routed = gathered_rows * self.router.top_k * (4 + 8)
        run = max(
            self.router.activation_bytes(gathered_rows),
            routed + self.experts.activation_bytes(gathered_rows, self.router.top_k),
        )
        back = gathered_rows * row + max(copied, own_rows * row)
        return gathered_rows * row + max(own_rows * row, copied + run, back)

    def __call__(self, x: Tensor, exchange: RowExchange) -> Tensor:
        plan, collective = exchange.plan, exchange.collective
        if plan.total_gathered == 0:
            return x
        gathered = collective.gather_rows(pad(x, plan, exchange.poison), plan.gathered_rows)
        partial = self._partial_sums(gathered, plan)
        return strip(collective.reduce_scatter_rows(partial, plan.gathered_rows), plan)

    def _partial_sums(self, gathered: Tensor, plan: PaddingPlan) -> Tensor:
        """This rank's experts' share of every real row, zero in padded rows."""
        if plan.real_index is None:
            return self._run(gathered)
        real = plan.real_index.to(gathered.device)
        sums = self._run(gathered[real])
        return torch.zeros_like(gathered).index_copy_(0, real, sums)

    def _run(self, rows: Tensor) -> Tensor:
        weights, ids = self.router(rows)
        return self.experts(rows, ids, weights)
