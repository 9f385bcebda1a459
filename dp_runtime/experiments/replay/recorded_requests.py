"""The requests of a recording: when they came to which rank, and how long they were."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.errors import require
from dp_runtime.experiments.replay.possible_steps import MAX_COUNT
from dp_runtime.experiments.replay.recorded_steps import recorded_config, recorded_steps
from dp_runtime.metrics.recording import ModelSizes, Recording
from dp_runtime.metrics.trace import Arrival, End


@dataclass(frozen=True)
class RecordedRequest:
    request_id: int
    dp_rank: int  # the position of the rank that it ended on
    step: int  # before which it came there, counted from the first; idle ones have numbers too
    at_s: float  # when it first came to a rank, after the first step's start
    prompt_tokens: int
    cached_tokens: int  # of the prompt, which were not computed
    max_tokens: int
    output_tokens: int


def recorded_requests(recording: Recording) -> list[RecordedRequest]:
    """Return requests that came and ended within a recording of one epoch, as they came.

    One that a rank gave back counts for the rank that it went to; one without a token is left out.
    """
    steps, stayed = recorded_steps(recording), "ranks neither came nor went"
    epochs, num_ranks = {step.traces[0].epoch for step in steps}, len(steps[0].traces)
    require(len(epochs) == 1, "recording: epochs", len(epochs), f"1: {stayed}")
    config = recorded_config(recording)
    dp_size = config.dp_size
    _check_sizes(recording.model, config.page_size)
    require(num_ranks == dp_size, "recording: ranks", num_ranks, f"dp_size {dp_size}: {stayed}")
    start_s = min(trace.start_s for trace in steps[0].traces)
    came: dict[int, tuple[Arrival, int, int]] = {}
    times: dict[int, float] = {}
    ended: dict[int, End] = {}
    for step in steps:
        number = step.traces[0].step_id - steps[0].traces[0].step_id
        for position, trace in enumerate(step.traces):
            for arrival in trace.arrived:
                came.pop(arrival.request_id, None)
                came[arrival.request_id] = arrival, position, number
                times.setdefault(arrival.request_id, max(0.0, trace.start_s - start_s))
            ended |= {end.request_id: end for end in trace.ended}
    found = [
        RecordedRequest(
            request_id, position, number, times[request_id], arrival.prompt_tokens,
            ended[request_id].cached_tokens, arrival.max_tokens, ended[request_id].output_tokens,
        )
        for request_id, (arrival, position, number) in came.items()
        if request_id in ended and ended[request_id].output_tokens
    ]  # fmt: skip
    require(bool(found), "recording: requests", 0, "at least one that came and ended")
    for request in found:
        _check(request, recording.model)
    return found


def _check_sizes(sizes: ModelSizes, page_size: int) -> None:
    tokens, length = sizes.cache_tokens, sizes.max_model_len
    ok, allowed = page_size <= tokens <= MAX_COUNT - page_size, f"{page_size} or more, an int32"
    require(ok, "recording: model: cache_tokens", tokens, allowed)
    allowed = f"at most cache_tokens, {tokens}"
    require(length <= tokens, "recording: model: max_model_len", length, allowed)


def _check(request: RecordedRequest, sizes: ModelSizes) -> None:
    """Raise ValueError for a request that no rank of such a model can have served."""
    where, prompt = f"recording: request {request.request_id}", request.prompt_tokens
    cached, output = request.cached_tokens, request.output_tokens
    allowed = f"1 or more that with {output} of output are at most {sizes.max_model_len}"
    ok = 0 < prompt <= sizes.max_model_len - output
    require(ok, f"{where}: prompt_tokens", prompt, allowed)
    require(cached < prompt, f"{where}: cached_tokens", cached, f"below its prompt's {prompt}")
    allowed = f"at most {MAX_COUNT}"
    require(request.max_tokens <= MAX_COUNT, f"{where}: max_tokens", request.max_tokens, allowed)
    allowed = f"at most its max_tokens, {request.max_tokens}"
    require(output <= request.max_tokens, f"{where}: output_tokens", output, allowed)
