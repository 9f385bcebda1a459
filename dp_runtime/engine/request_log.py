"""RequestLog: one live request on the driver, and all that was delivered of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from time import monotonic
from typing import Protocol

import numpy as np

from dp_runtime.core.request import (
    FinishReason,
    RankRequest,
    RequestDelta,
    RequestOutput,
    RequestUpdate,
    RoutedExperts,
    TokenLogprob,
)
from dp_runtime.engine.routing.load_balancer import Demand
from dp_runtime.metrics.recorded.request_tokens import RequestTokens
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.text.output_text import OutputText, TextStep
from dp_runtime.text.tokenizer import Tokenizer


class RequestLog:
    """The request and every token delivered so far, which is all that a replay would need."""

    def __init__(
        self,
        request: RankRequest,
        totals: RequestTotals,
        tokenizer: Tokenizer | None,
        demand: Demand,
    ) -> None:
        self.request, self.demand = request, demand
        self.abort_asked = False
        self.num_losses = 0  # of ranks that served it, since its last token
        self.submitted_at = monotonic()
        self.num_cached_tokens = 0  # of the prompt, known with the first token
        self.token_ids: list[int] = []
        self.arrivals: list[tuple[float, int]] = []  # time.monotonic(), and how many tokens came
        self.output: RequestOutput | None = None  # once it has ended
        self._totals = totals  # of its rank
        self.awaits_token = True  # its first one of its rank
        self._text = _output_text(request, tokenizer) if tokenizer is not None else None
        self._shown: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] = []
        self._routed: list[RoutedExperts] = []  # of each update that has some

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def dp_rank(self) -> int:
        return self._totals.dp_rank

    def apply(self, update: RequestUpdate) -> RequestDelta | None:
        """Take over what the rank did; returns what is new for the user."""
        assert update.first_index == len(self.token_ids), (
            f"request {self.request_id}: token {update.first_index} came, "
            f"{len(self.token_ids)} is next"
        )
        self.prompt_logprobs += update.prompt_logprobs
        if update.routed_experts is not None:
            self._routed.append(update.routed_experts)
        text = self._read(update)
        token_ids = update.token_ids[: text.num_kept]
        logprobs = update.logprobs[: text.num_kept]
        self.token_ids += token_ids
        self._logprobs += logprobs
        if token_ids and not self.arrivals:
            self.num_cached_tokens = update.num_cached_tokens
        if token_ids:
            self._arrive(len(token_ids))
        reason = FinishReason.STOP if text.stop else update.finish_reason
        if not (text.text or token_ids or reason):
            return None
        self._shown.append(text.text)
        if reason:
            self.output = self._finished(reason, text.stop or update.stop_reason)
        shown_logprobs = None if self.request.params.logprobs is None else logprobs
        return RequestDelta(self.request_id, text.text, token_ids, reason, shown_logprobs)

    def replay(self, totals: RequestTotals) -> RankRequest:
        """Go on at another rank, or the same one's successor, after all that was delivered."""
        self._totals, self.awaits_token = totals, True
        return replace(
            self.request,
            outputs=tuple(self.token_ids),
            num_scored=len(self.prompt_logprobs),
            num_routed=sum(map(len, self._routed)),
        )

    def end_here(self, reason: FinishReason) -> RequestUpdate:
        return RequestUpdate(self.request_id, len(self.token_ids), finish_reason=reason)

    def end_without_rank(self) -> RequestUpdate:
        """What a request hears that no rank goes on with."""
        if self.abort_asked:
            return self.end_here(FinishReason.ABORT)
        cause = f"{self.num_losses} ranks were lost before it had another token"
        return RequestUpdate.failed(self.request_id, len(self.token_ids), cause)

    def _arrive(self, count: int) -> None:
        now, first = monotonic(), not self.arrivals
        before = self.submitted_at if first else self.arrivals[-1][0]
        self._totals.add_tokens(now - before, count, first)
        self.arrivals.append((now, count))
        self.num_losses = 0
        self.awaits_token = False

    def end(self, reason: FinishReason) -> None:
        self._totals.add_end(reason, monotonic() - self.submitted_at)

    def _read(self, update: RequestUpdate) -> TextStep:
        """Return the text of new tokens, with what was held back if they are the last ones."""
        token_ids = update.token_ids
        if self._text is None:
            return TextStep("", None, len(token_ids))
        ends_by_token = update.stop_reason is not None
        hides_last = ends_by_token and not self.request.params.include_stop_str_in_output
        step = self._text.push(token_ids[:-1] if hides_last else token_ids)
        if update.finish_reason is None or step.stop is not None:
            return step
        rest = self._text.finish()
        num_kept = len(token_ids) if rest.stop is None else step.num_kept
        return TextStep(step.text + rest.text, rest.stop, num_kept)

    def _finished(self, reason: FinishReason, stop_reason: int | str | None) -> RequestOutput:
        params = self.request.params
        return RequestOutput(
            request_id=self.request_id,
            prompt_token_ids=self.request.prompt_token_ids,
            text="".join(self._shown),
            token_ids=tuple(self.token_ids),
            finish_reason=reason,
            stop_reason=stop_reason,
            dp_rank=self.dp_rank,
            logprobs=None if params.logprobs is None else tuple(self._logprobs),
            prompt_logprobs=(
                None if params.prompt_logprobs is None else tuple(self.prompt_logprobs)
            ),
            routed_experts=self._routed_experts() if self._routed else None,
            num_cached_tokens=self.num_cached_tokens,
        )

    def _routed_experts(self) -> RoutedExperts:
        """Join what came; tokens that a stop string cut off had theirs too."""
        num_tokens = len(self.request.prompt_token_ids) + len(self.token_ids)
        return np.concatenate(self._routed)[: num_tokens - 1]


class Held(Protocol):
    """What a user holds of a request."""

    @property
    def request(self) -> RankRequest: ...

    @property
    def output(self) -> RequestOutput | None: ...  # once it has ended


def tokens_of(handles: Iterable[Held]) -> Iterator[RequestTokens]:
    """Yield what those that have ended asked and got; those that had more than tokens not."""
    for handle in handles:
        if handle.output is not None:
            kept = RequestTokens.of(handle.request, handle.output.token_ids)
            if kept is not None:
                yield kept


def _output_text(request: RankRequest, tokenizer: Tokenizer) -> OutputText:
    params = request.params
    return OutputText(
        tokenizer, params.stop_strings, params.min_tokens, request.prompt_token_ids,
        params.skip_special_tokens, params.include_stop_str_in_output,
    )  # fmt: skip
