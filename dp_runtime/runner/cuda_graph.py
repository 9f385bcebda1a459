"""Capturing one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dp_runtime.host.capturing import capturing

Output = TypeVar("Output")


def capture_graph(run: Callable[[], Output], pool: Any) -> tuple[torch.cuda.CUDAGraph, Output]:
    run()  # compiles, plans and connects: none of it may happen while capturing
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads that abort or watch the rank call CUDA meanwhile. An exception ends the capture.
    with capturing(), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        output = run()
    return graph, output
