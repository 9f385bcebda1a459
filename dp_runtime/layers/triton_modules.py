"""What Triton compiles for a rank's MoE stage, so that none of it is compiled while serving."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from dp_runtime.kernel_builds import Kernel
from dp_runtime.layers.expert_tiles import ExpertTiles, choose_tiles
from dp_runtime.layers.experts import ExpertShard, aligned
from dp_runtime.layers.triton_experts import run_experts
from dp_runtime.layers.triton_router import RouteTile, RoutingCounters, route
from dp_runtime.models.config import ModelConfig


def modules(
    model: ModelConfig, shard: ExpertShard, most_rows: int, dtype: torch.dtype, device: torch.device
) -> tuple[Kernel, ...]:
    """The experts' kernels with all tiles that up to most_rows gathered rows may choose.

    One module: Triton's compiler runs in one thread of a process.
    """
    if shard.is_empty or not model.num_moe_layers:
        return ()
    top_k, experts = model.num_experts_per_tok, model.num_experts
    inner = aligned(len(shard.intermediate))
    rows = [*(1 << power for power in range(most_rows.bit_length())), most_rows]
    tilings = {choose_tiles(count, top_k, experts, inner): None for count in rows}
    routes = {RouteTile.of(count): None for count in rows}
    build = partial(
        _build, tuple(routes), tuple(tilings), model, (len(shard.experts), inner), dtype, device
    )
    return (Kernel(f"Triton experts ({len(routes) + len(tilings)} tilings)", build),)


def _build(
    routes: Sequence[RouteTile],
    tilings: Sequence[ExpertTiles],
    model: ModelConfig,
    shard: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Run the kernels over a row that is not real: they are compiled, and read no expert's weight.

    shard: local experts and their intermediate size.
    """
    num_local, inner = shard
    hidden, renormalize = model.hidden_size, model.norm_topk_prob
    rows = torch.zeros(1, hidden, dtype=dtype, device=device)
    router = rows.new_zeros(model.num_experts, hidden)
    counters = RoutingCounters.zeros(num_local, device)
    layout = torch.zeros(2, 1, dtype=torch.int32, device=device)
    gate_up = rows.new_empty(1).expand(num_local, 2 * inner, hidden)
    down = rows.new_empty(1).expand(num_local, hidden, inner)
    for route_tile in routes:
        routing = route(
            rows, router, layout, model.num_experts_per_tok, renormalize, 0, num_local, counters,
            route_tile,
        )  # fmt: skip
    for tiles in tilings:
        run_experts(rows, gate_up, down, routing, tiles)
