"""Attention backends by name; each is imported when it is first made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from dp_runtime.attention.contract import LayerContract
from dp_runtime.errors import require
from dp_runtime.protocols import AttentionBackend

LayerBackends = Callable[[int], AttentionBackend]  # the backend of a layer
Pools = Sequence[Tensor]  # [layer], each [num_pages, 2, num_kv_heads, page_size, head_dim]


def _torch_ref(pools: Pools, num_heads: int) -> LayerBackends:
    from dp_runtime.attention.query_groups import QueryPlanner
    from dp_runtime.attention.torch_ref import TorchRefAttention

    planner = QueryPlanner(num_kv_heads=pools[0].shape[2], page_size=pools[0].shape[3])
    return lambda layer: TorchRefAttention(
        pools[layer], LayerContract.of(layer, num_heads, pools[layer]), planner
    )


def _trtllm(pools: Pools, num_heads: int) -> LayerBackends:
    from dp_runtime.attention.kernel_groups import KernelPlanner
    from dp_runtime.attention.trtllm import TrtllmAttention, make_kernels

    planner = KernelPlanner(decode_query_lens=frozenset({1}))
    kernels = make_kernels(pools[0].shape[4], pools[0].device)
    return lambda layer: TrtllmAttention(
        pools[layer], LayerContract.of(layer, num_heads, pools[layer]), planner, kernels
    )


def _flashinfer(pools: Pools, num_heads: int) -> LayerBackends:
    from dp_runtime.attention.native import NativeAttention, NativePlanner

    planner = NativePlanner(LayerContract.of(0, num_heads, pools[0]), pools[0])
    return lambda layer: NativeAttention(
        pools[layer], LayerContract.of(layer, num_heads, pools[layer]), planner
    )


BACKENDS: dict[str, Callable[[Pools, int], LayerBackends]] = {
    "torch_ref": _torch_ref,
    "trtllm": _trtllm,
    "flashinfer": _flashinfer,
}


def make_backend(name: str, pools: Pools, num_heads: int) -> LayerBackends:
    """Backends of all layers, over their pools."""
    require(name in BACKENDS, "attention_backend", name, f"one of {', '.join(BACKENDS)}")
    return BACKENDS[name](pools, num_heads)


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """Resolve "auto" for a device: the backend's name, and why it was chosen."""
    if device.type == "cpu":
        ok = name in ("auto", "torch_ref")
        require(ok, "attention_backend", name, "auto or torch_ref on device cpu")
        return "torch_ref", "the only backend for device cpu"
    if name != "auto":
        return name, "chosen in the configuration"
    if find_spec("flashinfer") is None:
        return "torch_ref", "flashinfer is not installed"
    return "trtllm", "the TRT-LLM kernels serve this device"
