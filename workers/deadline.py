"""Calls that have no deadline of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from time import monotonic
from typing import TypeVar

from dp_runtime.errors import StartError

Result = TypeVar("Result")


def within(deadline: float, phase: str, work: Callable[[], Result]) -> Result:
    """Run work in a thread; StartError names the phase if the deadline, of monotonic(), passes."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result_within(deadline, phase, future)


def result_within(deadline: float, phase: str, future: Future[Result]) -> Result:
    """Wait for a future; StartError names the phase if the deadline, of monotonic(), passes."""
    try:
        return future.result(max(deadline - monotonic(), 0.0))
    except TimeoutError:
        if future.done():  # its own error
            return future.result()
        raise StartError(f"{phase} did not end in start_timeout_s") from None
