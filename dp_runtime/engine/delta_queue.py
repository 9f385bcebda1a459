"""DeltaQueue: deltas that wait for the reader of a stream."""

from __future__ import annotations

from collections import deque

from dp_runtime.core.request import FinishReason, RequestDelta, TokenLogprob

MAX_WAITING_DELTAS = 64


class DeltaQueue:
    """Holds at most MAX_WAITING_DELTAS: a slow reader gets fewer and larger ones, and all text."""

    def __init__(self) -> None:
        self._waiting: deque[_Merged] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, delta: RequestDelta) -> None:
        if len(self._waiting) < MAX_WAITING_DELTAS:
            self._waiting.append(_Merged(delta))
        else:
            self._waiting[-1].add(delta)

    def get(self) -> RequestDelta:
        return self._waiting.popleft().delta()


class _Merged:
    """Consecutive deltas of one request, which become one."""

    def __init__(self, first: RequestDelta) -> None:
        self._request_id = first.request_id
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if first.logprobs is None else []
        self._finish_reason: FinishReason | None = None
        self.add(first)

    def add(self, delta: RequestDelta) -> None:
        self._texts.append(delta.text)
        self._token_ids += delta.token_ids
        if self._logprobs is not None:
            self._logprobs += delta.logprobs or ()
        self._finish_reason = delta.finish_reason

    def delta(self) -> RequestDelta:
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        return RequestDelta(
            self._request_id, "".join(self._texts), tuple(self._token_ids), self._finish_reason,
            logprobs,
        )  # fmt: skip
