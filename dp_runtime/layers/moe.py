"""The MoE stage: the one place where ranks exchange rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from dp_runtime.layers.experts import Experts, ExpertShard, balanced_part
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.moe_router import Router
from dp_runtime.layers.routing_buffer import LayerRouting
from dp_runtime.parallel.row_exchange import RowExchange


@dataclass(frozen=True)
class RankSharding:
    moe_sharding: str  # "ep" or "tp"
    position: int  # of the rank among those of its epoch
    dp_size: int

    def shard(self, num_experts: int, intermediate_size: int) -> ExpertShard:
        """Split by expert ("ep") or by intermediate size ("tp"); parts differ by one at most."""
        experts, intermediate = range(num_experts), range(intermediate_size)
        match self.moe_sharding:
            case "ep":
                return ExpertShard(self._part(experts), intermediate)
            case "tp":
                return ExpertShard(experts, self._part(intermediate))
            case _:
                raise ValueError(f"moe_sharding: {self.moe_sharding!r} is not allowed; ep or tp")

    def _part(self, whole: range) -> range:
        return balanced_part(whole, self.position, self.dp_size)


@dataclass(frozen=True, eq=False)
class MoeStage:
    """reduce_scatter(experts(all_gather(x))), [rows, hidden]; padding is neither routed nor run."""

    router: Router
    experts: Experts
    kernels: MoeKernels

    def keeping(self, routing: LayerRouting) -> MoeStage:
        """Copy the stage; its router leaves what it chooses there."""
        return replace(self, router=replace(self.router, routing=routing))

    def activation_bytes(self, own_rows: int, gathered_rows: int, padded: bool) -> int:
        """Count the most bytes a call allocates at once; padded: not all gathered rows are real."""
        hidden = self.experts.down.shape[1]
        row = hidden * self.router.dtype.itemsize
        run = self.kernels.activation_bytes(gathered_rows, padded, self.router, self.experts)
        back = gathered_rows * row + own_rows * row
        return gathered_rows * row + max(own_rows * row, run, back)

    def __call__(self, x: Tensor, exchange: RowExchange) -> Tensor:
        if exchange.plan.total_gathered == 0:
            return x
        gathered = exchange.gather(x)
        partial = self.kernels.partial_sums(
            gathered, exchange.plan, exchange.row_ranges, self.router, self.experts
        )
        return exchange.reduce_scatter(partial)
