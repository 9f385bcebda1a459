"""Capturing CUDA graphs: a single one, or a row of them with something else between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch

from dp_runtime.host.capturing import capturing

Output = TypeVar("Output")
# Threads that abort or watch the rank call CUDA meanwhile.
ERROR_MODE = "thread_local"


@dataclass(frozen=True, eq=False)
class GraphMemory:
    """Memory that graphs share of which one ends before another begins; it is one stream's."""

    pool: Any
    stream: Any

    @classmethod
    def new(cls) -> GraphMemory:
        return cls(torch.cuda.graph_pool_handle(), torch.cuda.Stream())  # type: ignore[no-untyped-call]


def capture_graph(
    run: Callable[[], Output], memory: GraphMemory
) -> tuple[torch.cuda.CUDAGraph, Output]:
    run()  # compiles, plans and connects: none of it may happen while capturing
    with PieceCapture(memory) as capture:
        output = run()
    return capture.graphs[0], output


class PieceCapture:
    """Captures what is launched in its `with` as graphs, each up to the next cut.

    `torch.cuda.graph` would also empty torch's caches each time, which takes longer than a capture.
    """

    def __init__(self, memory: GraphMemory) -> None:
        self.graphs = list[torch.cuda.CUDAGraph]()
        self._memory = memory
        self._turn, self._on_stream = capturing(), torch.cuda.stream(memory.stream)

    def cut(self) -> None:
        self.graphs[-1].capture_end()
        self._begin()

    def __enter__(self) -> PieceCapture:
        torch.cuda.synchronize()
        self._turn.__enter__()
        self._on_stream.__enter__()  # type: ignore[no-untyped-call]
        self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.graphs[-1].capture_end()
        finally:
            self._on_stream.__exit__(kind, error, trace)
            self._turn.__exit__(kind, error, trace)

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._memory.pool, capture_error_mode=ERROR_MODE)
        self.graphs.append(graph)
