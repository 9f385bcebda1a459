"""Attention backends by name; each is imported when it is first asked for."""

from __future__ import annotations

from pkgutil import resolve_name

import torch

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.support import NOT_INSTALLED, has_flashinfer
from dp_runtime.errors import require

BACKENDS = {
    "torch_ref": "dp_runtime.attention.torch_ref:TorchRefBackend",
    "split": "dp_runtime.attention.trtllm.split:SplitBackend",
    "trtllm": "dp_runtime.attention.trtllm.backend:TrtllmBackend",
    "flashinfer": "dp_runtime.attention.flashinfer.backend:FlashinferBackend",
}
GPU_PREFERENCE = ("split", "trtllm", "flashinfer", "torch_ref")
CHOSEN = "chosen in the configuration"


def backend_class(name: str) -> type[AttentionBackend]:
    require(name in BACKENDS, "attention_backend", name, f"one of {', '.join(BACKENDS)}")
    backend: type[AttentionBackend] = resolve_name(BACKENDS[name])
    return backend


def choose_backend(name: str, spec: AttentionSpec, device: torch.device) -> tuple[str, str]:
    """Resolve "auto", and say why; ValueError if the backend asked for can't serve the spec."""
    if device.type == "cpu":
        ok = name in ("auto", "torch_ref")
        require(ok, "attention_backend", name, "auto or torch_ref on device cpu")
        return "torch_ref", "the only backend for device cpu"
    if name != "auto":
        backend_class(name).check(spec, device)
        return name, _why_chosen(name, spec)
    if not has_flashinfer():
        return "torch_ref", NOT_INSTALLED
    refused = []
    for candidate in GPU_PREFERENCE:
        try:
            backend_class(candidate).check(spec, device)
            reason = backend_class(candidate).reason(spec)
        except ValueError as error:
            refused.append(f"not {candidate}: {error}")
            continue
        return candidate, "; ".join([reason, *refused])
    raise AssertionError("torch_ref serves every spec")


def _why_chosen(name: str, spec: AttentionSpec) -> str:
    """Say so, and what speaks against it: split may do no more than trtllm."""
    try:
        backend_class(name).reason(spec)
    except ValueError as error:
        return f"{CHOSEN}; {error}"
    return CHOSEN
