"""What must hold after a soak, and the repetition of some of its requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep

import numpy as np

from dp_runtime import Engine, FinishReason, RequestOutput
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.status import RankHealth
from dp_runtime.metrics.trace import StepTrace
from examples.soak_load import LoadShape, SoakRequest

QUIET_STEPS, MIN_PREEMPTIONS = 50, 2
POLL_S, IDLE_S = 0.002, 10.0


@dataclass
class Served:
    """What came back of a load; the mappings are by the index of a request."""

    outputs: dict[int, RequestOutput] = field(default_factory=dict)
    streamed: dict[int, tuple[int, ...]] = field(default_factory=dict)  # its deltas, joined
    sent_to: dict[int, int | None] = field(default_factory=dict)  # the rank; None: routed
    max_in_flight: int = 0
    quiet_steps: int = 0  # steps in a row with no row on the quiet rank


def find_faults(
    requests: Sequence[SoakRequest],
    shape: LoadShape,
    served: Served,
    report: Report,
    ranks: Sequence[RankHealth],
) -> list[str]:
    """Everything that is wrong with an outcome, in words; nothing if it is right."""
    outputs = served.outputs
    faults = [f"request {r.index} is lost" for r in requests if r.index not in outputs]
    for request in requests:
        if request.index in outputs:
            faults += _faults_of(request, served, shape.doomed)
    ids = {output.request_id for output in outputs.values()}
    if not len(ids) == len(outputs) == report.requests:
        faults.append(f"{len(outputs)} outputs of {len(ids)} requests; {report.requests} ended")
    delivered = sum(len(output.token_ids) for output in outputs.values())
    if delivered != report.output_tokens:
        faults.append(f"{report.output_tokens} tokens were made, {delivered} delivered")
    faults += [
        f"rank {rank.dp_rank}: {rank.free_pages} of {rank.num_pages - 1} pages are free"
        for rank in ranks
        if rank.free_pages != rank.num_pages - 1
    ]
    in_flight = min(shape.in_flight, shape.num_requests)
    for what, found, minimum in (
        ("requests in flight", served.max_in_flight, in_flight),
        ("steps in a row with a quiet rank", served.quiet_steps, QUIET_STEPS),
        ("preemptions", report.preemptions, MIN_PREEMPTIONS),
    ):
        if found < minimum:
            faults.append(f"{found} {what}; a soak has at least {minimum}")
    return faults


def _faults_of(request: SoakRequest, served: Served, doomed: int) -> Iterator[str]:
    index, output = request.index, served.outputs[request.index]
    found, due = len(output.token_ids), request.params.known_max_tokens
    reason = output.finish_reason
    ended = f"request {index} ended as {reason} after {found} of {due} tokens"
    if index == doomed:
        if reason is not FinishReason.ABORT or not 0 < found < due:
            yield f"{ended}; it was aborted in mid-flight"
    elif reason is not FinishReason.LENGTH or found != due:
        yield ended
    if served.streamed[index] != output.token_ids:
        yield f"request {index} streamed {len(served.streamed[index])} tokens, other than its own"
    if output.prompt_token_ids != tuple(request.prompt.token_ids):
        yield f"request {index} came back with another prompt"
    if served.sent_to[index] not in (None, output.dp_rank):
        yield f"request {index} ran on rank {output.dp_rank}, not {served.sent_to[index]}"


def longest_quiet(steps: Sequence[StepTrace], rank: int) -> int:
    """The most steps in a row in which a rank had no row while another one had."""
    longest = current = 0
    for step in steps:
        if step.dp_rank == rank:
            real = np.array([each.real_rows for each in step.passes])
            quiet = not real[:, rank].any() and real.any()
            current = current + 1 if quiet else 0
            longest = max(longest, current)
    return longest


def run_again(
    engine: Engine, requests: Sequence[SoakRequest], served: Served, shape: LoadShape, count: int
) -> list[str]:
    """Repeat some greedy requests, each alone and on another rank; which differ, and where."""
    greedy = [r for r in requests if r.params.greedy and r.index != shape.doomed]
    with_embeds = [r for r in greedy if r.prompt.prompt_embeds is not None]
    order = np.random.default_rng(shape.seed).permutation(len(greedy))
    chosen = [*with_embeds[:1], *(greedy[at] for at in order)][:count]
    differences = []
    with ProgressBar("again, alone", len(chosen), "request") as progress:
        for request in chosen:
            first = served.outputs[request.index]
            rank = (first.dp_rank + 1) % shape.dp_size
            again = engine.generate([request.prompt], request.params, [rank])[0].token_ids
            pairs = enumerate(zip(again, first.token_ids, strict=True))
            at = next((at for at, (one, other) in pairs if one != other), None)
            if at is not None:
                differences.append(f"request {request.index} from token {at} of {len(again)}")
            progress.update(chosen.index(request) + 1)
    return differences


def wait_for_pages(engine: Engine) -> tuple[RankHealth, ...]:
    """The ranks' health once all pages are free, or as it is after IDLE_S."""
    deadline = monotonic() + IDLE_S
    while True:
        ranks = engine.health()
        free = all(rank.free_pages == rank.num_pages - 1 for rank in ranks)
        if free or monotonic() > deadline:
            return ranks
        sleep(POLL_S)
