"""How a benchmark times one operation that it repeats."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Times:
    """Median and 99th percentile of one operation, in microseconds."""

    median_us: float
    p99_us: float


def measure(operation: Callable[[], Any], iterations: int, warmup: int = 100) -> Times:
    """Time each of `iterations` calls, after some that are not counted."""
    for _ in range(warmup):
        operation()
    seconds = []
    for _ in range(iterations):
        start = time.perf_counter()
        operation()
        seconds.append(time.perf_counter() - start)
    seconds.sort()
    return Times(seconds[iterations // 2] * 1e6, seconds[iterations * 99 // 100] * 1e6)
