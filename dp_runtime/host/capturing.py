"""Keeps other threads of a process off the device while one of them captures a CUDA graph.

CUDA refuses to wait for a device on which a stream is captured, and then the capture fails too
(CUDA programming guide, "Prohibited and Unhandled Operations" of stream capture).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_turn = threading.RLock()  # of the process, as captures are


@contextmanager
def capturing() -> Iterator[None]:
    """Hold the turn to capture; nothing inside may wait for another rank."""
    with _turn:
        yield


@contextmanager
def not_capturing(timeout_s: float) -> Iterator[None]:
    """Keep captures from beginning, once the present one has ended or timeout_s is over."""
    free = _turn.acquire(timeout=timeout_s)
    try:
        yield
    finally:
        if free:
            _turn.release()
