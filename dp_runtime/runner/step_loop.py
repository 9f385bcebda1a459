"""One rank's step, from schedule to commit, and the loop that repeats it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import monotonic, perf_counter

import torch

from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.errors import StepAbandoned
from dp_runtime.metrics.totals import Recorder
from dp_runtime.parallel.agreement import Agreement, FaultBits, StepRecord
from dp_runtime.parallel.buckets import PiecewiseBuckets
from dp_runtime.parallel.row_exchange import counts_real_rows
from dp_runtime.parallel.step_coordinator import StepCoordinator
from dp_runtime.runner.graphs.pending_capture import PendingCapture
from dp_runtime.runner.held_requests import HeldRequests
from dp_runtime.runner.step_runner import CapturedGraphs, StepRunner
from dp_runtime.runner.step_timer import StepClock, StepTimer
from dp_runtime.runner.step_tracing import Heard, InflightStep, trace_of
from dp_runtime.scheduler.abandonment import fail_prefill
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput

IDLE_S = 1.0

Deliver = Callable[[list[RequestUpdate]], None]


@dataclass(frozen=True, eq=False)
class Inbox:
    add: Sequence[RankRequest] = ()
    abort: Sequence[int] = ()
    recall: Sequence[int] = ()
    stop: bool = False


class StepLoop:
    def __init__(
        self,
        scheduler: Scheduler,
        coordinator: StepCoordinator,
        runner: StepRunner,
        recorder: Recorder,
        max_inflight_steps: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.coordinator = coordinator
        self.runner = runner
        self.launch = runner.run
        self.sampler = runner.sampler
        self.flight = runner.flight
        self.recorder = recorder
        self.last_finished = (-1, monotonic())  # step id, when
        self.idle = threading.Event()
        self._max_inflight_steps = max_inflight_steps
        self._inflight: deque[InflightStep] = deque()
        self._pending: PendingCapture | None = None
        self._num_drafts = (0, 0)  # proposed and accepted since the last record
        self._wait_s = 0.0  # for slower ranks, in the last step
        self._clock = StepClock()
        self._held = HeldRequests()
        self._heard = Heard()  # since the last step that ran
        self._dp_rank = coordinator.dp_rank

    @property
    def is_capturing(self) -> bool:
        return self._pending is not None

    def capture(self, pending: PendingCapture) -> None:
        """Capture these between steps from now on, and then replay them; an event of all ranks."""
        self._pending = pending

    def advance_capture(self) -> None:
        """Capture the next graph of what is pending, at the same place of a step on all ranks.

        NOTE: who can replay more votes so in its next record, so all ranks plan by these graphs
        from the same step on.
        """
        if self._pending is None:
            return
        captured = self._pending.advance()
        if captured is not None:
            self.use_graphs(captured)
        if self._pending.use is not None:
            self._pending = None

    def use_graphs(self, captured: CapturedGraphs) -> None:
        """Choose among these graphs from the next step on; all ranks have captured the same."""
        self.runner.use_graphs(captured)
        collective, stages = self.coordinator.collective, captured.piecewise
        buckets = stages[self.runner.model].buckets if stages else PiecewiseBuckets()
        self.coordinator.execute_by(
            replace(
                self.coordinator.execution,
                graphs={
                    (pass_kind, query_len): graphs.buckets
                    for pass_kind, by_query_len in captured.passes.items()
                    for query_len, graphs in by_query_len.items()
                },
                piecewise=buckets,
                counted=counts_real_rows(collective),
            )
        )

    def run(self, take: Callable[[], Inbox], deliver: Deliver) -> None:
        """Step until all ranks agree to stop; an exception frees the other ranks first."""
        self._inflight.clear()
        try:
            while self.step(take(), deliver):
                pass
        except BaseException as error:
            self.flight.fail(error)
            self.coordinator.abort(f"{type(error).__name__}: {error}")
            raise

    def step(self, inbox: Inbox, deliver: Deliver) -> bool:
        """Schedule, post a record, agree, build metadata, run passes, sample, commit.

        Ranks agree before any of them builds metadata, so sizes are final when they are first used.
        With one step in flight the step committed here is the one before: the host schedules and
        agrees while the device computes. Returns False once all ranks have agreed to stop.
        """
        deliver(self._apply(inbox))
        if not self.runner.may_run_ahead:
            self._commit_down_to(0, deliver)
        timer = StepTimer(self.coordinator.board)
        self.flight.schedule(self.coordinator.step_id)
        budget = self.coordinator.prefill_budget
        scheduled = self.scheduler.schedule(self.coordinator.program, budget)
        deliver(self.scheduler.take_failed())
        record = self._record(scheduled, inbox.stop)
        timer.end_schedule()
        self.flight.post(record)
        records = self.coordinator.board.all_gather_records(record)
        agreement = self.coordinator.agree(records)
        self.flight.agree(agreement)
        timer.end_agree()
        self._count(agreement)
        self._count_budget(budget, record)
        if agreement.stop:
            return False
        if agreement.idle:
            self._rest(deliver)
        else:
            self._launch(scheduled, agreement, record, timer, deliver)
        if self.is_capturing:
            self._commit_down_to(0, deliver)  # a capture waits for the device: tokens go out first
            self.flight.capture()
            self.advance_capture()
        return True

    def _launch(
        self,
        scheduled: SchedulerOutput,
        agreement: Agreement,
        record: StepRecord,
        timer: StepTimer,
        deliver: Deliver,
    ) -> None:
        self.runner.clear_pages(self.scheduler.page_table.take_pages_to_clear())
        try:
            output = self.launch(scheduled, agreement, record.graph_votes)
        except torch.OutOfMemoryError as error:
            self._blame_request(scheduled, error, deliver)
            raise
        self._wait_s = timer.agree_wait_s + sum(each.wait_s for each in output.passes)
        heard, self._heard = self._heard, Heard()
        self._inflight.append(InflightStep(scheduled, agreement, record, output, timer, heard))
        self._commit_down_to(self._max_inflight_steps, deliver)

    def _blame_request(
        self, scheduled: SchedulerOutput, error: Exception, deliver: Deliver
    ) -> None:
        """Have the one request that prefilled fail alone; without it the rank is well."""
        failed = fail_prefill(self.scheduler, scheduled, error)
        if failed is not None:
            deliver([failed])
            raise StepAbandoned(f"request {failed.request_id}: {failed.error}") from error

    def _commit_down_to(self, max_inflight_steps: int, deliver: Deliver) -> None:
        while len(self._inflight) > max_inflight_steps:
            deliver(self.commit(self._inflight.popleft()))

    def _rest(self, deliver: Deliver) -> None:
        """No rank has rows: commit or capture what is left, else sleep until a request arrives.

        NOTE: every rank calls `idle`, if only for no time, or its next record wakes nobody. Ranks
        differ in what is in flight: those that may not run ahead have committed it already.
        """
        works = bool(self._inflight) or self.scheduler.has_work or self.is_capturing
        goes_on = works or bool(self._held)
        self._commit_down_to(0, deliver)
        if not goes_on:
            self.idle.set()
            self.flight.rest()
        self.coordinator.board.idle(0.0 if goes_on else IDLE_S)
        self.idle.clear()

    def _count(self, agreement: Agreement) -> None:
        """Count what only the agreement after a step, or before its end, tells."""
        slowest = self.coordinator.members.dp_ranks[agreement.slowest]
        self.recorder.totals.add_wait(slowest, self._wait_s)
        self._wait_s = 0.0
        for seconds in self.scheduler.requests.take_queue_times():
            self.recorder.totals.queue_s.add(seconds)

    def _count_budget(self, budget: int | None, record: StepRecord) -> None:
        limit = self.scheduler.limits.max_num_tokens
        if budget is not None:
            held_back = record.prefill_rows >= budget < limit and record.queued_tokens > 0
            self.recorder.totals.add_prefill_budget(budget, held_back)

    def _apply(self, commands: Inbox) -> list[RequestUpdate]:
        added = self._held.due(commands.add, self.coordinator.step_id)
        for request in added:
            self.scheduler.add(request)
        ended = [self.scheduler.abort(request_id) for request_id in commands.abort]
        recalled = [self.scheduler.requests.recall(each) for each in commands.recall]
        self._heard.hear(added, ended)
        return [item for item in ended if item] + recalled

    def _record(self, scheduled: SchedulerOutput, stop: bool) -> StepRecord:
        (proposed, accepted), self._num_drafts = self._num_drafts, (0, 0)
        return StepRecord(
            *self.coordinator.step_key,
            scheduled.real_rows,
            queued_tokens=self.scheduler.queued_tokens,
            drafts_proposed=proposed,
            drafts_accepted=accepted,
            graph_votes=self.runner.graph_votes(scheduled, self.coordinator.program),
            fault_bits=FaultBits.STOP if stop else FaultBits.NONE,
            waited_us=round(self._wait_s * 1e6),
            prefill_rows=scheduled.prefill_rows,
            num_sampling=len(scheduled.sampled),
            step_us=self._clock.take_us(self.coordinator.step_id - 1 - self._max_inflight_steps),
            replays_routing=int(len(scheduled.target.replays) > 0),
        )

    def commit(self, step: InflightStep) -> list[RequestUpdate]:
        at, output = perf_counter(), step.output
        self.flight.commit(step.agreement.step_id)
        output.sampled.copy.wait()
        if self.coordinator.limits_prefill:
            self._clock.committed(step.agreement.step_id, step.timer.started, output.sampled.copy)
        self.coordinator.collective.raise_if_failed()  # an abort may have ended the step's kernels
        tokens = output.tokens()
        num_accepted = tokens.num_accepted
        prompt_logprobs = [
            score if isinstance(score, Exception) else score.to_host() for score in output.scores
        ]
        progress = self.scheduler.commit(step.scheduled, tokens, prompt_logprobs)
        if output.routed is not None:
            progress = step.scheduled.routed.told(output.routed.wait()[0].numpy(), progress)
        proposed, accepted = len(num_accepted) * step.scheduled.num_drafts, sum(num_accepted)
        self._num_drafts = (self._num_drafts[0] + proposed, self._num_drafts[1] + accepted)
        self._trace(step, progress, num_accepted, at)
        return progress

    def _trace(
        self,
        step: InflightStep,
        progress: list[RequestUpdate],
        num_accepted: Sequence[int],
        commit_start_s: float,
    ) -> None:
        ranks = self._dp_rank, self.coordinator.collective.dp_rank
        trace = trace_of(step, self.scheduler, ranks, progress, num_accepted, commit_start_s)
        self.recorder.add(trace)
        self.last_finished = (step.agreement.step_id, monotonic())
        self.flight.committed(step.agreement.step_id)
