"""DeltaQueue: deltas that wait for the reader of a stream."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from dp_runtime.core.request import RequestDelta

MAX_WAITING_DELTAS = 64


class DeltaQueue:
    """Holds what has come; a slow reader gets fewer and larger deltas, and all text."""

    def __init__(self) -> None:
        self._waiting: list[RequestDelta] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, delta: RequestDelta) -> None:
        if len(self._waiting) == MAX_WAITING_DELTAS:
            self._waiting = [_merged(self._waiting)]
        self._waiting.append(delta)

    def take(self) -> RequestDelta:
        """Return all that waits as one delta; there must be some."""
        waiting, self._waiting = self._waiting, []
        return waiting[0] if len(waiting) == 1 else _merged(waiting)


def _merged(deltas: Sequence[RequestDelta]) -> RequestDelta:
    logprobs = tuple(chain.from_iterable(delta.logprobs or () for delta in deltas))
    return RequestDelta(
        deltas[0].request_id,
        "".join(delta.text for delta in deltas),
        tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        deltas[-1].finish_reason,
        None if deltas[0].logprobs is None else logprobs,
    )
