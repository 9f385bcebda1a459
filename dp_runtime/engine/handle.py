"""RequestHandle: the driver's side of one request, and its entry in the token log."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic

from dp_runtime.core.request import (
    FinishReason,
    RankRequest,
    RequestDelta,
    RequestOutput,
    RequestUpdate,
    TokenLogprob,
)
from dp_runtime.engine.tokenizer import OutputText, TextStep


class RequestHandle:
    """A submitted request: wait for it, iterate over its deltas, or abort it.

    It holds the request and every token delivered so far, which is all that a replay on another
    rank would need.
    """

    def __init__(
        self,
        request: RankRequest,
        dp_rank: int,
        text: OutputText | None,
        on_abort: Callable[[RequestHandle], None],
    ) -> None:
        self.request = request
        self.dp_rank = dp_rank
        self.token_ids: list[int] = []
        self.arrivals: list[tuple[float, int]] = []  # time.monotonic(), and how many tokens came
        self._text = text
        self._on_abort = on_abort
        self._shown: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._deltas: deque[RequestDelta] = deque()
        self._changed = threading.Condition()
        self._output: RequestOutput | None = None
        self._error: BaseException | None = None

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def done(self) -> bool:
        """It ended, or its engine failed."""
        return self._output is not None or self._error is not None

    def result(self, timeout: float | None = None) -> RequestOutput:
        """The finished request; raises TimeoutError after `timeout` seconds, or why it failed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self.done, timeout):
                raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
            if self._error:
                raise self._error
            assert self._output is not None, "a request without an error has an output"
            return self._output

    def abort(self) -> None:
        """End the request where it is; its result says `abort` unless it was already done."""
        self._on_abort(self)

    def __iter__(self) -> Iterator[RequestDelta]:
        """What comes in, as it comes in; the last delta has the finish reason."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._deltas or self.done)
                if not self._deltas:
                    if self._error:
                        raise self._error
                    return
                delta = self._deltas.popleft()
            yield delta

    def apply(self, progress: RequestUpdate) -> bool:
        """Take over what the rank did; True if a stop string ended the request just now."""
        with self._changed:
            if self.done:
                return False  # the rank had not heard yet that a stop string ended it
            assert progress.first_index == len(self.token_ids), (
                f"request {self.request_id}: token {progress.first_index} came, "
                f"{len(self.token_ids)} is next"
            )
            self._prompt_logprobs += progress.prompt_logprobs
            text = self._read(progress)
            token_ids = progress.token_ids[: text.num_kept]
            self.token_ids += token_ids
            if token_ids:
                self.arrivals.append((monotonic(), len(token_ids)))
            self._logprobs += progress.logprobs[: text.num_kept]
            reason = FinishReason.STOP if text.stop else progress.finish_reason
            if text.text or token_ids or reason:
                self._shown.append(text.text)
                self._deltas.append(RequestDelta(self.request_id, text.text, token_ids, reason))
            if reason:
                self._finish(reason, text.stop or progress.stop_reason)
            self._changed.notify_all()
            return text.stop is not None and progress.finish_reason is None

    def fail(self, error: BaseException) -> None:
        """The engine can not finish the request."""
        with self._changed:
            if not self.done:
                self._error = error
                self._changed.notify_all()

    def _read(self, progress: RequestUpdate) -> TextStep:
        """The text of new tokens, with what was held back if they are the last ones."""
        if self._text is None:
            return TextStep("", None, len(progress.token_ids))
        step = self._text.push(progress.token_ids)
        if progress.finish_reason is None or step.stop is not None:
            return step
        rest = self._text.finish()
        return TextStep(step.text + rest.text, rest.stop, step.num_kept)

    def _finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        params = self.request.params
        self._output = RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            text="".join(self._shown),
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            stop_reason=stop_reason,
            dp_rank=self.dp_rank,
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=(
                None if params.prompt_logprobs is None else tuple(self._prompt_logprobs)
            ),
        )
