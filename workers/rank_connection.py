"""The driver's end of the connection to a rank's process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeVar
from weakref import WeakSet

from dp_runtime.errors import RankFailed
from workers.messages import Call, Message, Reply

Answer = TypeVar("Answer")


class RankConnection:
    """Sends calls, which never wait for the rank, and takes in answers, in two threads of its own.

    What lies unsent is bounded by max_queued_requests; RankWatch sees a rank that does not read.
    """

    def __init__(self, connection: Connection, why_ended: Callable[[], RankFailed]) -> None:
        self._connection, self._why_ended = connection, why_ended
        self._calls: dict[int, Future[Any]] = {}
        self._ids = count()
        self._lock = threading.RLock()  # a call may come from the collection of garbage in one
        self._ended = False
        self._unsent: SimpleQueue[Call | None] = SimpleQueue()
        self._sender = threading.Thread(target=self._send, name="rank-calls", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="rank-answers", daemon=True).start()
        _connections.add(self)

    def call(self, message: Message[Answer]) -> Future[Answer]:
        """Send a message; raises what pickling it raises."""
        call = Call.with_message(next(self._ids), message)
        future: Future[Answer] = Future()
        with self._lock:
            if not self._ended:
                self._calls[call.call_id] = future
                self._unsent.put(call)
                return future
        future.set_exception(self._why_ended())
        return future

    def _send(self) -> None:
        while (call := self._unsent.get()) is not None:
            try:
                self._connection.send(call)
            except OSError:
                return  # the other thread sees the end as well

    def _receive(self) -> None:
        while True:
            try:
                reply: Reply = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._calls.pop(reply.call_id)
            try:
                value, error = reply.answer
            except Exception as broken:
                value, error = None, RankFailed(f"an answer can not be read: {broken!r}")
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(value)
        with self._lock:
            self._ended = True
            calls, self._calls = self._calls, {}
            self._unsent.put(None)
        self._sender.join()  # it can not wait any more, for the other end is closed
        self._connection.close()
        for future in calls.values():
            future.set_exception(self._why_ended())

    def disown(self) -> None:
        """Let go of it in a forked child, whose copy would keep the connection open."""
        self._lock = threading.RLock()  # a thread of the parent may have held the other one
        self._ended = True
        self._connection.close()


_connections: WeakSet[RankConnection] = WeakSet()


def _disown_all() -> None:
    for connection in list(_connections):
        connection.disown()
    _connections.clear()


os.register_at_fork(after_in_child=_disown_all)
