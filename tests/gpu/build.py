"""Compiles and loads the modules that tests need, all at the same time."""

from __future__ import annotations

from collections.abc import Iterable
from time import monotonic

import torch

from dp_runtime.attention.registry import backend_class
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.kernels.jit_build import KernelBuilds


def build_all(needs: Iterable[tuple[str, AttentionSpec]], device: torch.device) -> None:
    """Build each module that (backend, spec) pairs need once; prints which, and how long it took.

    The longest come first: FMHAv2 has some hundred sources, XQA five.
    """
    found = {
        module.name: module
        for name, spec in needs
        for module in backend_class(name).jit_modules(spec, device)
    }
    started = monotonic()
    with KernelBuilds([found[name] for name in sorted(found)], device) as builds:
        builds.wait()
    seconds = monotonic() - started
    print(f"\n{len(found)} modules in {seconds:.0f} s: {'; '.join(sorted(found))}", flush=True)
