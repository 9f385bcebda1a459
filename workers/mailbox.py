"""Requests on their way to a rank's step loop, and its outputs on their way to the driver."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from time import sleep

from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.errors import CollectiveTimeout, RankDisagreement, StepAbandoned
from dp_runtime.runner.step_loop import Inbox
from workers.messages import Blame, Polled

LINGER_S = 0.002  # outputs that follow within this time travel together


class Mailbox:
    """Both directions between the threads of one rank; everything is callable from any thread."""

    def __init__(self) -> None:
        self.error: str | None = None  # why the loop has ended
        self.blame = Blame.NOBODY  # for that
        self._changed = threading.Condition()
        self._added: list[RankRequest] = []
        self._aborted: list[int] = []
        self._recalled: list[int] = []
        self._stopping = False
        self._outbox: list[RequestUpdate] = []

    @property
    def num_added(self) -> int:
        return len(self._added)

    def submit(self, requests: Sequence[RankRequest]) -> None:
        with self._changed:
            self._added += requests

    def abort(self, request_ids: Sequence[int]) -> None:
        with self._changed:
            self._aborted += request_ids

    def recall(self, request_ids: Sequence[int]) -> None:
        with self._changed:
            self._recalled += request_ids

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def take(self) -> Inbox:
        with self._changed:
            inbox = Inbox(self._added, self._aborted, self._recalled, self._stopping)
            self._added, self._aborted, self._recalled = [], [], []
            return inbox

    def deliver(self, updates: list[RequestUpdate]) -> None:
        if updates:
            with self._changed:
                self._outbox += updates
                self._changed.notify_all()

    def fail(self, error: str, blame: Blame) -> None:
        with self._changed:
            self.error, self.blame = error, blame
            self._changed.notify_all()

    def recover(self) -> None:
        """Serve the next epoch with what was submitted and delivered meanwhile."""
        with self._changed:
            self.error = None

    def poll(self, timeout_s: float) -> Polled:
        """Return what was delivered since the last poll; waits for it up to timeout_s."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self.error or self._stopping, timeout_s)
            arrived = bool(self._outbox) and not self.error
        if arrived:
            sleep(LINGER_S)
        with self._changed:
            progress, self._outbox = self._outbox, []
            return Polled(progress, self.error, self.blame is Blame.RANK)


def blame_of(error: BaseException) -> Blame:
    match error:
        case StepAbandoned():
            return Blame.REQUEST
        case CollectiveTimeout() | RankDisagreement():
            return Blame.NOBODY
    return Blame.RANK
