"""What is kept of a step from its launch to its commit, and the trace that it leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.metrics.trace import Arrival, End, StepTrace
from dp_runtime.parallel.agreement import Agreement, StepRecord
from dp_runtime.runner.step_runner import StepOutput
from dp_runtime.runner.step_timer import StepTimer
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput


@dataclass(eq=False)
class Heard:
    """Requests that came or were aborted between steps."""

    arrived: list[Arrival] = field(default_factory=list)
    aborted: list[End] = field(default_factory=list)

    def hear(self, added: Sequence[RankRequest], aborted: Sequence[RequestUpdate | None]) -> None:
        self.arrived += [
            Arrival(each.request_id, len(each.prompt_token_ids), each.params.known_max_tokens)
            for each in added
        ]
        self.aborted += [end_of(each) for each in aborted if each is not None]


@dataclass(frozen=True, eq=False)
class InflightStep:
    scheduled: SchedulerOutput
    agreement: Agreement
    record: StepRecord
    output: StepOutput
    timer: StepTimer
    heard: Heard = field(default_factory=Heard)


def trace_of(
    step: InflightStep,
    scheduler: Scheduler,
    ranks: tuple[int, int],  # dp_rank and position
    progress: Sequence[RequestUpdate],
    num_accepted: Sequence[int],
    commit_start_s: float,
) -> StepTrace:
    timer, output, scheduled = step.timer, step.output, step.scheduled
    dp_rank, position = ranks
    ended = [end_of(update) for update in progress if update.finish_reason]
    return StepTrace(
        dp_rank=dp_rank,
        position=position,
        step_id=step.agreement.step_id,
        epoch=step.agreement.epoch,
        start_s=timer.started,
        schedule_s=timer.schedule_s,
        agree_s=timer.agree_s,
        agree_wait_s=timer.agree_wait_s,
        prepare_s=output.prepare_s,
        sample_s=output.sample_s,
        commit_s=perf_counter() - commit_start_s,
        passes=output.passes,
        output_tokens=sum(len(item.token_ids) for item in progress),
        prompt_tokens=sum(chunk.prompt_tokens for chunk in scheduled.chunks),
        num_preemptions=scheduler.num_preemptions,
        prefixes=scheduler.prefix_counts,
        num_drafts=scheduled.num_drafts,
        accepted=tuple(map(num_accepted.count, range(scheduled.num_drafts + 1))),
        sample_start_s=output.sample_start_s,
        commit_start_s=commit_start_s,
        record=step.record.to_words(),
        kv_tokens=kv_tokens(scheduled.target),
        attended_tokens=attended_tokens(scheduled.target),
        arrived=tuple(step.heard.arrived),
        ended=(*step.heard.aborted, *ended),
        encode_s=output.encode_s,
        num_images=len(scheduled.to_encode),
        free_pages=scheduler.num_free_pages,
    )


def end_of(update: RequestUpdate) -> End:
    outputs = update.first_index + len(update.token_ids)
    return End(update.request_id, outputs, update.num_cached_tokens)


def kv_tokens(batch: LocalBatch) -> int:
    """Count what a batch's requests have in the cache after it."""
    return int(np.add.reduce(batch.seq_lens, dtype=np.int64))


def attended_tokens(batch: LocalBatch) -> int:
    """Count the cached tokens that a batch's rows attend to: each its own and all before it."""
    if batch.num_tokens == batch.num_requests:  # a row each, their last
        return kv_tokens(batch)
    rows = batch.query_lens.astype(np.int64)
    return int((rows * batch.seq_lens - rows * (rows - 1) // 2).sum())
