"""One rank's step, from schedule to commit, and the loop that repeats it."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic, perf_counter

from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.metrics.trace import Recorder, StepTrace
from dp_runtime.parallel.agreement import Agreement, FaultBits
from dp_runtime.parallel.coordinator import RankStats, StepCoordinator
from dp_runtime.runner.step_runner import StepOutput, StepRunner
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput, StepResult

IDLE_S = 1.0


@dataclass(frozen=True, eq=False)
class Inbox:
    """What came in for a rank since its last step."""

    add: Sequence[RankRequest] = ()
    abort: Sequence[int] = ()
    stop: bool = False


@dataclass(frozen=True)
class PhaseTimes:
    """When a step began, and the seconds its first phases took."""

    started: float
    schedule_s: float
    agree_s: float
    agree_wait_s: float


@dataclass(frozen=True, eq=False)
class InflightStep:
    """A step whose results the host has not looked at yet."""

    scheduled: SchedulerOutput
    agreement: Agreement
    output: StepOutput
    times: PhaseTimes


class StepLoop:
    """Runs the steps of one rank: schedule, post, agree, build metadata, run, sample, commit.

    With `depth` 1 a step is scheduled and agreed on before the one before it is committed; with
    depth 0 the same code commits each step first.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        coordinator: StepCoordinator,
        runner: StepRunner,
        recorder: Recorder,
        depth: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.coordinator = coordinator
        self.runner = runner
        self.sampler = runner.sampler
        self.recorder = recorder
        self.depth = depth
        self.last_finished = (-1, monotonic())  # step id, when
        self.idle = threading.Event()
        self._verified = (0, 0)  # drafts proposed and accepted since the last record
        self._dp_rank = coordinator.collective.dp_rank

    def run(
        self,
        take: Callable[[], Inbox],
        deliver: Callable[[list[RequestUpdate]], None],
    ) -> None:
        """Step until all ranks agree to stop; an exception frees the other ranks first."""
        try:
            self._run(take, deliver)
        except BaseException as error:
            self.coordinator.abort(f"{type(error).__name__}: {error}")
            raise

    def _run(
        self,
        take: Callable[[], Inbox],
        deliver: Callable[[list[RequestUpdate]], None],
    ) -> None:
        in_flight: deque[InflightStep] = deque()
        while True:
            commands = take()
            deliver(self._apply(commands))
            while in_flight and not self.runner.may_run_ahead:
                deliver(self.commit(in_flight.popleft()))
            scheduled, agreement, times = self._agree(commands.stop)
            if agreement.stop:
                return
            if not agreement.idle:
                in_flight.append(self.launch(scheduled, agreement, times))
            depth = 0 if agreement.idle else self.depth
            settled = not in_flight
            while len(in_flight) > depth:
                deliver(self.commit(in_flight.popleft()))
            if settled and agreement.idle:
                self._sleep()

    def _agree(self, stop: bool) -> tuple[SchedulerOutput, Agreement, PhaseTimes]:
        """Schedule this rank's rows and agree with the others on the step."""
        board = self.coordinator.board
        started, waited = perf_counter(), board.waited_s
        scheduled = self.scheduler.schedule(self.coordinator.program)
        load = self._load(scheduled)
        at_agree = perf_counter()
        faults = FaultBits.STOP if stop else FaultBits.NONE
        agreement = self.coordinator.agree(scheduled.real_rows, load, faults)
        waited = board.waited_s - waited
        agree_s = perf_counter() - at_agree - waited
        return scheduled, agreement, PhaseTimes(started, at_agree - started, agree_s, waited)

    def _sleep(self) -> None:
        """All ranks are empty: no step until a request arrives at one of them."""
        self.idle.set()
        self.coordinator.board.idle(0.0 if self.scheduler.has_work else IDLE_S)
        self.idle.clear()

    def _apply(self, commands: Inbox) -> list[RequestUpdate]:
        for request in commands.add:
            self.sampler.add(request)
            self.scheduler.add(request)
        ended = [self.scheduler.abort(request_id) for request_id in commands.abort]
        progress = [item for item in ended if item]
        for item in progress:
            self.sampler.remove(item.request_id)
        return progress

    def _load(self, scheduled: SchedulerOutput) -> RankStats:
        (proposed, accepted), self._verified = self._verified, (0, 0)
        return RankStats(
            num_requests=len(self.scheduler.running),
            free_pages=self.scheduler.allocator.num_free,
            queued_tokens=self.scheduler.queued_tokens,
            wants_prefill=scheduled.prefill,
            graph_votes=self.runner.graph_votes(scheduled),
            drafts_proposed=proposed,
            drafts_accepted=accepted,
        )

    def launch(
        self, scheduled: SchedulerOutput, agreement: Agreement, times: PhaseTimes
    ) -> InflightStep:
        """Build metadata, run the passes of the program and sample, all without waiting for it."""
        return InflightStep(scheduled, agreement, self.runner.launch(scheduled, agreement), times)

    def commit(self, step: InflightStep) -> list[RequestUpdate]:
        """Look at what the step sampled, and move its requests on."""
        at, output = perf_counter(), step.output
        output.sampled.copy.wait()
        self.coordinator.collective.raise_if_failed()  # an abort may have ended the step's kernels
        token_ids, logprobs, num_accepted = output.sampled.to_host()
        scores = [score.to_host() for score in output.scores]
        tokens = StepResult(token_ids, logprobs, scores, num_accepted)
        progress = self.scheduler.commit(step.scheduled, tokens)
        for item in progress:
            if item.finish_reason:
                self.sampler.remove(item.request_id)
        proposed, accepted = len(num_accepted) * step.scheduled.num_drafts, sum(num_accepted)
        self._verified = (self._verified[0] + proposed, self._verified[1] + accepted)
        self._record(step, progress, num_accepted, perf_counter() - at)
        return progress

    def _record(
        self,
        step: InflightStep,
        progress: list[RequestUpdate],
        num_accepted: Sequence[int],
        commit_s: float,
    ) -> None:
        times, output = step.times, step.output
        histogram = Counter(num_accepted)
        self.recorder.totals.preemptions = self.scheduler.num_preemptions
        self.recorder.add(
            StepTrace(
                dp_rank=self._dp_rank,
                step_id=step.agreement.step_id,
                epoch=step.agreement.epoch,
                start_s=times.started,
                schedule_s=times.schedule_s,
                agree_s=times.agree_s,
                agree_wait_s=times.agree_wait_s,
                prepare_s=output.prepare_s,
                sample_s=output.sample_s,
                commit_s=commit_s,
                passes=output.passes,
                output_tokens=sum(len(item.token_ids) for item in progress),
                prompt_tokens=sum(chunk.prompt_tokens for chunk in step.scheduled.chunks),
                num_drafts=step.scheduled.num_drafts,
                accepted=tuple(histogram[n] for n in range(step.scheduled.num_drafts + 1)),
            )
        )
        self.last_finished = (step.agreement.step_id, monotonic())
