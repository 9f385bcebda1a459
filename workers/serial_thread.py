"""A daemon thread that does one piece of work after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

Result = TypeVar("Result")
_Item = tuple[Callable[[], Any], "Future[Any]"]


class SerialThread:
    """Unlike the threads of an executor it does not keep the interpreter from ending."""

    def __init__(self, name: str) -> None:
        self._items: SimpleQueue[_Item | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        future: Future[Result] = Future()
        with self._lock:
            if self._error is None:
                self._items.put((work, future))
            else:
                future.set_exception(self._error)
        return future

    def end(self, error: BaseException) -> None:
        """Do what was submitted up to now; later work fails with the error. Does not wait."""
        with self._lock:
            if self._error is None:
                self._error = error
                self._items.put(None)

    def _run(self) -> None:
        while (item := self._items.get()) is not None:
            work, future = item
            try:
                result = work()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
            del item, work, future  # else they live until the next comes
