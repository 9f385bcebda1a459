"""Pollers: ask ranks for their outputs, a thread for each rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from dp_runtime.core.rank_events.listeners import Listeners
from dp_runtime.errors import RankFailed
from workers.messages import Poll, Polled
from workers.ranks import RankHandle, Seat
from workers.supervision.group_state import Evidence

POLL_S = 1.0
RETRY_S = 0.02  # where the rank can say nothing before somebody has seen to it


class Pollers:
    """Poll whoever has each seat, until `over`; report evidence of faults, and its epoch."""

    def __init__(
        self,
        listeners: Listeners,
        suspect: Callable[[Evidence, int], None],
        epoch: Callable[[], int],
        over: threading.Event,
    ) -> None:
        self._listeners, self._suspect = listeners, suspect
        self._epoch, self._over = epoch, over
        self._threads: dict[Seat, threading.Thread] = {}

    def follow(self, seats: Sequence[Seat]) -> None:
        """Poll these; a thread whose seat is vacant ends by itself."""
        before, self._threads = self._threads, {}
        for seat in seats:
            name = f"poll-rank-{seat.dp_rank}"
            thread = before.get(seat) or threading.Thread(
                target=self._run, args=(seat,), name=name, daemon=True
            )
            self._threads[seat] = thread
            if seat not in before:
                thread.start()

    def join(self) -> None:
        for thread in self._threads.values():
            if thread is not threading.current_thread():
                thread.join(POLL_S)

    def _run(self, seat: Seat) -> None:
        while not self._over.is_set() and not seat.is_vacant:
            handle, epoch = seat.handle, self._epoch()
            evidence = self._poll(seat, handle)
            if evidence is not None:
                seat.if_held(handle, partial(self._suspect, evidence, epoch))
                self._over.wait(RETRY_S)

    def _poll(self, seat: Seat, handle: RankHandle) -> Evidence | None:
        dp_rank = seat.dp_rank
        try:
            polled = handle.call(Poll(POLL_S)).result()
            seat.if_held(handle, partial(self._take, dp_rank, polled))
        except RankFailed as error:
            return Evidence(str(error), dp_rank)
        except Exception as error:
            return Evidence(f"rank {dp_rank}: {type(error).__name__}: {error}", dp_rank)
        if polled.error is None:
            return None
        return Evidence(polled.error, dp_rank if polled.at_fault else None)

    def _take(self, dp_rank: int, polled: Polled) -> None:
        if polled.kv_events:
            self._listeners.on_kv_events(dp_rank, polled.kv_events)
        if polled.progress:
            self._listeners.on_progress(dp_rank, polled.progress)
        if polled.load is not None:
            self._listeners.on_load(dp_rank, polled.load)
