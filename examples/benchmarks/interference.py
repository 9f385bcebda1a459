"""One rank prefills while the others decode: who drives the ranks, and what is read off them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.per_request_state import PerRequestState
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.step_program import Pass, Program
from dp_runtime.metrics.totals import Recorder
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.parallel.agreement import Agreement
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from examples.benchmarks.harness.kernel_profile import StepProfiler
from examples.benchmarks.harness.stepping import IDS_A_RANK, Load, SteppedRank

PREFILLING = 0  # the rank that prefills; all others decode
PAUSE = 4  # steps


@dataclass(frozen=True)
class SeenStep:
    """A step with rows on any rank, as one rank saw it."""

    at_s: float  # of the performance counter, when the host had the step's tokens
    prefill_rows: int  # of the prefilling rank
    tokens: Mapping[int, int]  # request id: tokens it got
    host_busy_s: float  # of this rank's host, without its waits for others


@dataclass(frozen=True)
class Gap:
    """Time between two consecutive emissions of one request."""

    at_s: float  # when it ended
    seconds: float


@dataclass(frozen=True)
class View:
    """All that one rank saw of a run."""

    dp_rank: int
    request_ids: tuple[int, ...]
    steps: tuple[SeenStep, ...]
    first_token_s: tuple[float, ...] = ()  # of the prefilling rank's prompts, since they were given

    def emitting_share(self) -> float:
        """Of the steps in which the other rank prefills: where every request here got a token."""
        prefills = [step for step in self.steps if step.prefill_rows]
        emitting = [all(step.tokens.get(i) for i in self.request_ids) for step in prefills]
        return sum(emitting) / len(emitting)

    def gaps_with_prefill(self) -> list[Gap]:
        """Times between a request's emissions with a step of prefill between them.

        The step of the later emission is one of those between. Tokens that one step emits for a
        request arrive together and count as one emission.
        """
        gaps, last, prefilled = [], dict[int, float](), dict[int, bool]()
        for step in self.steps:
            for request_id in self.request_ids:
                prefilled[request_id] = prefilled.get(request_id, False) or step.prefill_rows > 0
                if not step.tokens.get(request_id):
                    continue
                if request_id in last and prefilled[request_id]:
                    gaps.append(Gap(step.at_s, step.at_s - last[request_id]))
                last[request_id], prefilled[request_id] = step.at_s, False
        return gaps

    def prefill_step_s(self) -> list[float]:
        """Seconds of steps with prefill that followed another."""
        pairs = zip(self.steps, self.steps[1:])
        return [b.at_s - a.at_s for a, b in pairs if a.prefill_rows and b.prefill_rows]


class SeparateScheduler(Scheduler):
    """Prefills in steps of their own, in which no rank decodes.

    A rank with a prompt says so in the record of one step, as queued tokens, and prefills in the
    next: by then all ranks know.
    """

    def __init__(
        self, pages: PageGeometry, limits: Limits, states: Sequence[PerRequestState] = ()
    ) -> None:
        super().__init__(pages, limits, states)
        self.prefill_agreed = False
        self._nobodys = Scheduler(pages, limits)

    def schedule(self, program: Program, prefill_budget: int | None = None) -> SchedulerOutput:
        has_prefill = self.queued_tokens > 0
        if has_prefill == self.prefill_agreed:
            return super().schedule(program, prefill_budget)
        return self._nobodys.schedule(program)


@dataclass(eq=False)
class Driver:
    """Stands between a rank's loop and its load, and remembers every step."""

    pending: list[RankRequest]
    recorder: Recorder
    seen: list[SeenStep] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    profiler: StepProfiler | None = None  # of steps with prefill
    _recorded: int = field(init=False)

    def __post_init__(self) -> None:
        self._recorded = self.recorder.totals.steps

    def deliver(self, progress: list[RequestUpdate]) -> None:
        """What the loop has after every step, and after aborts, which end no step."""
        recorded, self._recorded = self._recorded, self.recorder.totals.steps
        if recorded != self._recorded:
            step = self.recorder.steps[-1]
            tokens = {item.request_id: len(item.token_ids) for item in progress}
            rows = target_rows(step)[PREFILLING]
            self.seen.append(SeenStep(perf_counter(), rows, tokens, step.busy_s))
            if rows and self.profiler is not None:
                self.profiler.count()


@dataclass(eq=False)
class Prefiller(Driver):
    """Gives its rank prompts, `at_once` of them, and the next ones `pause` steps after they ended.

    The first ones come after `hold` steps: by then the other ranks decode.
    """

    hold: int = 0
    pause: int = 0
    at_once: int = 1
    _given: dict[int, float] = field(default_factory=dict)
    _ready_at: int = field(init=False)  # number of steps seen

    def __post_init__(self) -> None:
        super().__post_init__()
        self._ready_at = self.hold

    def take(self) -> Inbox:
        if self._given or not self.pending or len(self.seen) < self._ready_at:
            return Inbox()
        added, self.pending = self.pending[: self.at_once], self.pending[self.at_once :]
        self._given = dict.fromkeys((request.request_id for request in added), perf_counter())
        return Inbox(added)

    def deliver(self, progress: list[RequestUpdate]) -> None:
        super().deliver(progress)
        for item in progress:
            self.first_token_s.append(self.seen[-1].at_s - self._given.pop(item.request_id))
            self._ready_at = len(self.seen) + self.pause


@dataclass(eq=False)
class Decoder(Driver):
    """Lets its rank decode until the other's prefill is over and `after` more steps are.

    Every decoding rank sees this at the same step; they then abort their requests, and stop once
    no step is in flight.
    """

    prefill_rows: int = 0  # of the prefilling rank, all prompts together
    after: int = 0
    _running: list[int] = field(default_factory=list)
    _over: bool = False
    _taken: int = 0  # number of steps seen
    _done_at: int | None = None

    def take(self) -> Inbox:
        added, self.pending = self.pending, []
        self._running += [request.request_id for request in added]
        before, self._taken = self._taken, len(self.seen)
        if self._over:
            return Inbox(stop=before == self._taken)
        self._over = self._done_at is not None and self._taken >= self._done_at + self.after
        return Inbox(added, abort=self._running if self._over else ())

    def deliver(self, progress: list[RequestUpdate]) -> None:
        before = len(self.seen)
        super().deliver(progress)
        if len(self.seen) > before:
            self.prefill_rows -= self.seen[-1].prefill_rows
        if self.prefill_rows <= 0 and self._done_at is None:
            self._done_at = len(self.seen)


@dataclass(frozen=True)
class Experiment:
    """What a run consists of."""

    prompt_len: int
    num_prompts: int
    decoders: int  # requests of every rank but the prefilling one
    context: int  # their prompts
    tokens_a_step: int  # that a step may emit for one of them
    least_chunk: int | None = None  # where a step's budget may be less than its chunk
    at_once: int = 1  # prompts that are there together

    def short(self) -> Experiment:
        """The same with few prompts."""
        return replace(self, num_prompts=2)

    def output_len(self, chunk: int) -> int:
        """Tokens of a decoder, enough for all steps of a run."""
        least = self._least(chunk)
        steps = self.num_prompts * (-(-self.prompt_len // least) + 2 * PAUSE)
        return (steps + 2 * self.hold(chunk) + 2 * PAUSE) * self.tokens_a_step

    def hold(self, chunk: int) -> int:
        """Steps after which the decoders' own prompts are in the cache, and some more."""
        return -(-self.decoders * self.context // self._least(chunk)) + 2 * PAUSE

    def _least(self, chunk: int) -> int:
        return chunk if self.least_chunk is None else min(chunk, self.least_chunk)

    def observe(
        self,
        rank: SteppedRank,
        way: str,
        chunk: int,
        first_id: int,
        profiler: StepProfiler | None = None,
    ) -> View:
        """One run, to be called by all ranks at the same time.

        way: `together`, as the runtime does it; `idling`, in which no rank decodes while one
        prefills; `alone`, in which there is nobody to decode and prompts queue up.
        """
        alone, first_id = way == "alone", first_id + rank.dp_rank * IDS_A_RANK
        vocab_size, recorder = rank.loop.sampler.vocab_size, rank.loop.recorder
        prefills = rank.dp_rank == PREFILLING
        if prefills:
            load = Load((self.prompt_len,) * self.num_prompts, 1)
        else:
            load = Load((self.context,) * (0 if alone else self.decoders), self.output_len(chunk))
        requests = list(load.requests(first_id, vocab_size))
        ids = tuple(request.request_id for request in requests)
        driver: Driver
        if prefills:
            hold, at_once = (0, len(requests)) if alone else (self.hold(chunk), self.at_once)
            driver = Prefiller(requests, recorder, hold=hold, pause=PAUSE, at_once=at_once)
        else:
            rows = self.prompt_len * self.num_prompts
            driver = Decoder(requests, recorder, prefill_rows=rows, after=0 if alone else PAUSE)
        driver.profiler = profiler
        with scheduling(rank.loop, chunk, way == "idling"), torch.inference_mode():
            rank.loop.run(driver.take, driver.deliver)
        rank.links.collective.barrier()
        return View(rank.dp_rank, ids, tuple(driver.seen), tuple(driver.first_token_s))


@contextmanager
def scheduling(loop: StepLoop, chunk: int, separate: bool) -> Iterator[None]:
    """Meanwhile the rank has a new scheduler, whose steps have `chunk` rows at most."""
    before, agree = loop.scheduler, loop.coordinator.agree
    limits = replace(before.limits, max_num_tokens=chunk)
    _, *states = before.requests.states  # the first is its page table
    scheduler = (SeparateScheduler if separate else Scheduler)(before.pages, limits, states)

    def agree_and_tell(*args: Any) -> Agreement:
        agreement = agree(*args)
        assert isinstance(scheduler, SeparateScheduler), "only it is told"
        scheduler.prefill_agreed = any(agreement.queued_tokens)
        return agreement

    loop.scheduler = scheduler
    told = patch.object(loop.coordinator, "agree", agree_and_tell)
    with told if separate else nullcontext():
        yield
    scheduler.check()
    loop.scheduler = before


def target_rows(step: StepTrace) -> tuple[int, ...]:
    """Real rows of the target pass, [rank]."""
    return next(each.real_rows for each in step.passes if each.pass_kind == Pass.TARGET)
