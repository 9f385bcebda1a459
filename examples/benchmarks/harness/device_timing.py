"""How a benchmark times GPU work, and the rates that its floors are computed from."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch

COPY_BYTES = 4 << 30
MATMUL_SIZE = 8192


def graph_us(operation: Callable[[int], object], variants: int, rounds: int = 5) -> float:
    """Microseconds of one call inside a CUDA graph, the median of `rounds` replays.

    operation(i) works on data set i of `variants`, so that the L2 does not hold its weights.
    """
    replay = captured(lambda: [operation(i % variants) for i in range(2 * variants)])
    replay()
    return median(event_us(replay) for _ in range(rounds)) / (2 * variants)


def captured(operation: Callable[[], object]) -> Callable[[], None]:
    """The same in a CUDA graph; it runs once before it is captured."""
    operation()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        operation()
    return graph.replay


def event_us(operation: Callable[[], object]) -> float:
    """Microseconds between two events around a call."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    operation()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000


def read_rate() -> float:
    """Bytes a second that an elementwise kernel moves, reads and writes counted."""
    source = torch.zeros(COPY_BYTES // 8, device="cuda")
    target = torch.empty_like(source)
    return COPY_BYTES / (graph_us(lambda i: torch.add(source, 1.0, out=target), 1) / 1e6)


def matmul_rate() -> float:
    """Operations a second of a large bf16 matrix product on random data."""
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, device="cuda").bfloat16() for _ in range(2))
    return 2 * MATMUL_SIZE**3 / (graph_us(lambda i: a @ b, 1) / 1e6)


def describe_gpu() -> str:
    """The GPU's name and the measured rates."""
    return (
        f"{torch.cuda.device_count()}x {torch.cuda.get_device_name()}; "
        f"copy {read_rate() / 1e12:.2f} TB/s, bf16 product {matmul_rate() / 1e12:.0f} TFLOP/s"
    )
