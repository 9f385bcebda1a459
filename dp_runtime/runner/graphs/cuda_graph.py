"""Capturing CUDA graphs: a single one, or a row of them with something else between."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    with capturing_pieces(memory) as capture:
        output = run()
    return capture.graphs[0], output


class PieceCapture:
    """Captures what is launched as graphs, each up to the next cut."""

    def __init__(self, memory: GraphMemory) -> None:
        self.graphs = list[torch.cuda.CUDAGraph]()
        self._memory = memory

    def begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._memory.pool, capture_error_mode=ERROR_MODE)
        self.graphs.append(graph)

    def end(self) -> None:
        self.graphs[-1].capture_end()

    def cut(self) -> None:
        self.end()
        self.begin()


@contextmanager
def capturing_pieces(memory: GraphMemory) -> Iterator[PieceCapture]:
    """Capture what is launched in the `with`; an exception ends the capture.

    `torch.cuda.graph` would also empty torch's caches each time, which takes longer than a capture.
    """
    torch.cuda.synchronize()
    with capturing(), torch.cuda.stream(memory.stream):
        capture = PieceCapture(memory)
        capture.begin()
        try:
            yield capture
        finally:
            capture.end()
