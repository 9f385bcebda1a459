"""Captured pieces of a forward without a GPU: a thread that waits at each cut."""

from __future__ import annotations

from collections.abc import Sequence
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch

from dp_runtime.models.causal_lm import Hidden
from dp_runtime.parallel.buckets import GraphKey
from dp_runtime.runner.graphs.forward_pieces import Cut, ForwardPieces


class PausedForward:
    """Stands for a key's pieces: each replay runs a forward on to its next cut."""

    def __init__(self, pieces: ForwardPieces, key: GraphKey, cuts: Sequence[Cut]) -> None:
        self.pieces, self.cuts = [self] * (len(cuts) + 1), cuts
        self._forward, self._key = pieces, key
        self._goes_on: SimpleQueue[None] = SimpleQueue()
        self._paused: SimpleQueue[Any] = SimpleQueue()
        self._thread: Thread | None = None
        self._hidden: Hidden | None = None

    @property
    def hidden(self) -> Hidden:
        assert self._thread is None, "the last piece has run"
        assert self._hidden is not None
        return self._hidden

    def replay(self) -> None:
        if self._thread is None:
            self._thread = Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._goes_on.put(None)
        error, ended = self._paused.get(timeout=30)
        if error is not None:
            raise error
        if ended:
            self._thread.join(30)
            self._thread = None

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                self._hidden = self._forward.cut_forward(self._key, self._pause)
        except BaseException as error:
            self._paused.put((error, True))
            raise
        self._paused.put((None, True))

    def _pause(self, cut: Cut) -> None:
        self._paused.put((None, False))
        self._goes_on.get(timeout=30)
