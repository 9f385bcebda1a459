"""Attention backends by name; each is imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import cast

import torch

from dp_runtime.attention.spec import AttentionSpec, Backend, KvScales, LayerBackends, Pools
from dp_runtime.errors import require
from dp_runtime.kernels.builds import JitModule

__all__ = [
    "BACKENDS",
    "AttentionSpec",
    "KvScales",
    "choose_backend",
    "kernels",
    "make_backend",
    "workspace_bytes",
]

BACKENDS = {
    "torch_ref": "dp_runtime.attention.torch_ref",
    "trtllm": "dp_runtime.attention.trtllm",
    "flashinfer": "dp_runtime.attention.flashinfer",
}
GPU_PREFERENCE = ("trtllm", "flashinfer", "torch_ref")


def _backend(name: str) -> Backend:
    require(name in BACKENDS, "attention_backend", name, f"one of {', '.join(BACKENDS)}")
    return cast(Backend, import_module(BACKENDS[name]))


def make_backend(
    name: str, spec: AttentionSpec, pools: Pools, scales: Sequence[KvScales] | None = None
) -> LayerBackends:
    """Backends of all layers over their pools; `scales` (1.0 by default) are [layer]."""
    return _backend(name).make(spec, pools, scales or [KvScales()] * len(pools))


def workspace_bytes(name: str, spec: AttentionSpec) -> int:
    """Device memory a backend allocates for itself, whatever the number of layers."""
    return _backend(name).workspace_bytes(spec)


def kernels(name: str, spec: AttentionSpec, device: torch.device) -> tuple[JitModule, ...]:
    """The modules a backend compiles and loads before it can serve."""
    return _backend(name).kernels(spec, device)


def choose_backend(name: str, spec: AttentionSpec, device: torch.device) -> tuple[str, str]:
    """Resolve "auto" for a spec and a device: the backend's name, and why it was chosen.

    Raises ValueError, with the alternative, if the backend asked for can't serve the spec.
    """
    if device.type == "cpu":
        ok = name in ("auto", "torch_ref")
        require(ok, "attention_backend", name, "auto or torch_ref on device cpu")
        return "torch_ref", "the only backend for device cpu"
    if name != "auto":
        _backend(name).check(spec, device)
        return name, "chosen in the configuration"
    refused = []
    for candidate in GPU_PREFERENCE:
        try:
            _backend(candidate).check(spec, device)
        except ValueError as error:
            refused.append(f"not {candidate}: {error}")
            continue
        return candidate, "; ".join(refused) or "its kernels serve this model on this device"
    raise AssertionError("torch_ref serves every spec")
