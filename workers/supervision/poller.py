"""Poller: takes in what a rank has to say, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from dp_runtime.core.request import RequestUpdate
from dp_runtime.errors import RankFailed
from workers.messages import Poll, Polled
from workers.ranks import RankHandle, Seat
from workers.supervision.group_state import Evidence

POLL_S = 1.0
RETRY_S = 0.02  # where the rank can say nothing before somebody has seen to it

OnProgress = Callable[[int, Sequence[RequestUpdate]], None]


class Poller:
    """Polls whoever has the seat, until `over`; reports evidence of faults, and its epoch."""

    def __init__(
        self,
        seat: Seat,
        on_progress: OnProgress,
        suspect: Callable[[Evidence, int], None],
        epoch: Callable[[], int],
        over: threading.Event,
    ) -> None:
        self._seat, self._on_progress, self._suspect = seat, on_progress, suspect
        self._epoch, self._over = epoch, over
        name = f"poll-rank-{seat.dp_rank}"
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def join(self) -> None:
        if self._thread is not threading.current_thread():
            self._thread.join(POLL_S)

    def _run(self) -> None:
        while not self._over.is_set():
            handle, epoch = self._seat.handle, self._epoch()
            evidence = self._poll(handle)
            if evidence is not None:
                self._seat.if_held(handle, partial(self._suspect, evidence, epoch))
                self._over.wait(RETRY_S)

    def _poll(self, handle: RankHandle) -> Evidence | None:
        dp_rank = self._seat.dp_rank
        try:
            polled = handle.call(Poll(POLL_S)).result()
            self._seat.if_held(handle, partial(self._take, polled))
        except RankFailed as error:
            return Evidence(str(error), dp_rank)
        except Exception as error:
            return Evidence(f"rank {dp_rank}: {type(error).__name__}: {error}", dp_rank)
        if polled.error is None:
            return None
        return Evidence(polled.error, dp_rank if polled.at_fault else None)

    def _take(self, polled: Polled) -> None:
        if polled.progress:
            self._on_progress(self._seat.dp_rank, polled.progress)
