"""Outputs: what requests get of ranks, heard without an engine."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

from dp_runtime.core.membership import Transition
from dp_runtime.core.rank_events.listeners import Listeners, Resume
from dp_runtime.core.request import RequestUpdate
from dp_runtime.errors import RankFailed, RequestFailed
from dp_runtime.metrics.progress_bar import ProgressBar


class Outputs:
    """Collects the tokens of some requests until all have ended, or something has failed."""

    def __init__(self, request_ids: Collection[int]) -> None:
        self.tokens: dict[int, list[int]] = defaultdict(list)  # by request id
        self._total, self._left = len(request_ids), set(request_ids)
        self._changed = threading.Condition()
        self._error: BaseException | None = None

    @property
    def listeners(self) -> Listeners:
        return Listeners(
            on_progress=self._hear,
            on_failure=self._fail,
            on_transition=_lose,
            on_load=lambda dp_rank, load: None,
            on_kv_events=lambda dp_rank, events: None,
        )

    def wait(self, silence_s: float, last_step: Callable[[], int], bar: ProgressBar) -> None:
        """Wait for all ends; RankFailed if there is no token, and no step, for so many seconds."""
        step = -1
        with self._changed:
            while self._left and self._error is None:
                if not self._changed.wait(silence_s):
                    before, step = step, last_step()
                    if step == before:
                        raise RankFailed(f"no step for {silence_s:g} s")
                bar.update(self._total - len(self._left))
            if self._error is not None:
                raise self._error

    def _hear(self, dp_rank: int, updates: Sequence[RequestUpdate]) -> None:
        with self._changed:
            for update in updates:
                self.tokens[update.request_id] += update.token_ids
                if update.error:
                    self._error = RequestFailed(f"request {update.request_id}: {update.error}")
                if update.finish_reason:
                    self._left.discard(update.request_id)
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._changed.notify_all()


def _lose(transition: Transition, resume: Resume) -> int:
    raise AssertionError("a replay replaces no rank")
