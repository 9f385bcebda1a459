"""Attention backends by name; each is imported when it is first made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dp_runtime.errors import require
from dp_runtime.protocols import AttentionBackend

LayerBackends = Callable[[int], AttentionBackend]  # the backend of a layer


def _torch_ref(pools: Sequence[Tensor], num_heads: int) -> LayerBackends:
    from dp_runtime.attention.contract import LayerContract
    from dp_runtime.attention.query_groups import QueryPlanner
    from dp_runtime.attention.torch_ref import TorchRefAttention

    planner = QueryPlanner(num_kv_heads=pools[0].shape[2], page_size=pools[0].shape[3])

    def make(layer: int) -> AttentionBackend:
        pool = pools[layer]
        return TorchRefAttention(
            pool, LayerContract.of(layer, num_heads, pool, pool.dtype), planner
        )

    return make


BACKENDS: dict[str, Callable[[Sequence[Tensor], int], LayerBackends]] = {"torch_ref": _torch_ref}


def make_backend(name: str, pools: Sequence[Tensor], num_heads: int) -> LayerBackends:
    """Backends of all layers; pools[layer] is [num_pages, 2, num_kv_heads, page_size, head_dim]."""
    require(name in BACKENDS, "attention_backend", name, f"one of {', '.join(BACKENDS)}")
    return BACKENDS[name](pools, num_heads)


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """Resolve "auto" for a device: the backend's name, and why it was chosen."""
    if name != "auto":
        return name, "chosen in the configuration"
    return "torch_ref", f"the only backend for device {device.type}"
