"""What a step's tokens mean for a request: outputs that it had not, and perhaps its end."""

from __future__ import annotations

from dp_runtime.core.request import FinishReason, RequestUpdate, TokenLogprob
from dp_runtime.scheduler.lifecycle import RequestLifecycle
from dp_runtime.scheduler.request_state import RequestState


def append_outputs(
    requests: RequestLifecycle,
    state: RequestState,
    tokens: tuple[int, ...],
    logprobs: tuple[TokenLogprob | None, ...],
    cause: str | None,  # of there being no next token, the logits of which were not valid
    prompt_logprobs: tuple[TokenLogprob, ...] = (),
) -> RequestUpdate:
    """Append a request's new tokens up to its end, if that is among them; the caller settles."""
    request, index, stop = state.request, len(state.outputs), None
    room = state.max_outputs - index
    if len(tokens) > room:
        tokens = tokens[:room]
    if not request.stop_token_ids.isdisjoint(tokens):
        stop = next(token for token in tokens if token in request.stop_token_ids)
        tokens = tokens[: tokens.index(stop) + 1]
    state.outputs += tokens
    if stop is not None:
        requests.finish(state, FinishReason.STOP)
    elif len(tokens) == room:
        requests.finish(state, FinishReason.LENGTH)
    elif cause is not None:
        requests.finish(state, FinishReason.ERROR)
        cause = cause or state.cause_of_no_token
        return RequestUpdate.failed(request.request_id, index, cause)
    known = tuple(entry for entry in logprobs[: len(tokens)] if entry) if logprobs else ()
    return RequestUpdate(
        request.request_id, index, tokens, known, prompt_logprobs, state.finish_reason, stop,
        state.num_prompt_cached or 0,
    )  # fmt: skip
