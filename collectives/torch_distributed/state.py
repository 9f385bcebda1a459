"""GroupState: whether a group over torch.distributed is open, failed or closed, and why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

from dp_runtime.errors import CollectiveAborted

SLACK_S = 1.0  # by which Gloo's own timeout is later than ours, and an abort may be later still


class Phase(Enum):
    OPEN = "open"
    FAILED = "failed"  # calls raise; the backends may still be waiting
    CLOSED = "closed"  # the backends are let go of


class GroupState:
    """Owns a group's backends and its first failure; the end of backends may block."""

    def __init__(self, release: Callable[[], None]) -> None:
        self._release = release
        self._lock = threading.Lock()
        self._failures: list[RuntimeError] = []
        self._has_failed = threading.Event()
        self._backends: dict[str, Any] = {}
        self._closer = threading.Thread(target=self._close_backends, daemon=True)
        self._closing = False

    @property
    def phase(self) -> Phase:
        if self._closing:
            return Phase.CLOSED
        return Phase.FAILED if self._failures else Phase.OPEN

    def add(self, name: str, backend: Any) -> None:
        self._backends[name] = backend

    def raise_if_failed(self) -> None:
        if self._failures:
            failure = self._failures[0]
            raise type(failure)(*failure.args)

    def start(self, backend: str, operation: Callable[[Any], Any]) -> Any:
        """Start an operation; no rank keeps a backend, whose destructor waits for operations."""
        with self._lock:
            self.raise_if_failed()
            return operation(self._backends[backend])

    def fail(self, failure: RuntimeError) -> None:
        """Have every later call raise the first failure; never waits."""
        self._failures.append(failure)
        self._has_failed.set()

    def close(self, failure: RuntimeError) -> None:
        """Fail, and drop the backends in a thread, which frees those who wait for them."""
        self.fail(failure)
        with self._lock:
            if not self._closing:
                self._closing = True
                self._closer.start()

    def join(self, timeout_s: float) -> None:
        self._closer.join(timeout_s)

    def raise_lost(self, what: str, error: RuntimeError) -> NoReturn:
        """Raise the abort that caused a backend's error; its alarm may arrive a moment later."""
        self._has_failed.wait(SLACK_S)
        self.fail(CollectiveAborted(f"{what} failed: {error}"))
        raise CollectiveAborted(*self._failures[0].args) from error

    def _close_backends(self) -> None:
        try:
            self._release()
        finally:
            with self._lock:  # no operation is being started on them
                backends, self._backends = self._backends, {}
            backends.clear()
