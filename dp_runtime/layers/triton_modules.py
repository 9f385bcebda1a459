"""What Triton compiles for a rank's MoE stage, so that none of it is compiled while serving."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from dp_runtime.kernel_builds import Kernel
from dp_runtime.layers.expert_tiles import ExpertTiles, choose_tiles
from dp_runtime.layers.experts import ExpertShard, aligned
from dp_runtime.layers.triton_experts import Routing, run_experts
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
    choices = {choose_tiles(count, top_k, experts, inner): None for count in rows}
    shape = (len(shard.experts), model.hidden_size, inner)
    build = partial(_build, tuple(choices), shape, top_k, dtype, device)
    return (Kernel(f"Triton experts ({len(choices)} tilings)", build),)


def _build(
    choices: Sequence[ExpertTiles],
    shape: tuple[int, int, int],
    top_k: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Run the kernels over no pair: they are compiled and loaded, and read no weight."""
    num_local, hidden, inner = shape
    rows = torch.zeros(1, hidden, dtype=dtype, device=device)
    routing = Routing(
        weights=torch.zeros(1, top_k, device=device),
        local_ids=torch.full((1, top_k), -1, dtype=torch.int32, device=device),
        counts=torch.zeros(num_local, dtype=torch.int32, device=device),
        pairs=torch.zeros(num_local, 1, dtype=torch.int32, device=device),
    )
    gate_up = rows.new_empty(1).expand(num_local, 2 * inner, hidden)
    down = rows.new_empty(1).expand(num_local, hidden, inner)
    for tiles in choices:
        run_experts(rows, gate_up, down, routing, tiles)
