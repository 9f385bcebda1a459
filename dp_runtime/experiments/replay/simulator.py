"""Schedules recorded requests anew, by the product's own scheduler and routing, on no device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dp_runtime.config import EngineConfig
from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.membership import Membership
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import Program
from dp_runtime.engine.routing.load_balancer import Demand
from dp_runtime.engine.routing.own_routing import load_balancer
from dp_runtime.engine.routing.rank_loads import RankLoads
from dp_runtime.errors import require
from dp_runtime.experiments.replay.recorded_requests import RecordedRequest
from dp_runtime.experiments.replay.step_shape import StepShape
from dp_runtime.metrics.recording import ModelSizes
from dp_runtime.parallel.agreement import StepRecord, agree
from dp_runtime.parallel.execution_plan import ExecutionPolicy
from dp_runtime.parallel.prefill_budget import BudgetPolicy
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.runner.step_tracing import attended_tokens, kv_tokens
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput

TOKEN, STOP_TOKEN = 0, 1


class SimulatedRank:
    """A rank whose model gives every request the number of tokens that it had."""

    def __init__(self, config: EngineConfig, sizes: ModelSizes, depth: int) -> None:
        limits = Limits(config.max_num_requests, config.max_num_tokens, sizes.max_model_len)
        num_pages = sizes.cache_tokens // config.page_size + 1
        # Prompts differ, so who was preempted finds its own pages again, and nobody another's.
        hasher = PageHasher(config.page_size, "replay") if config.prefix_caching else None
        pages = PageGeometry(num_pages, config.page_size)
        self.scheduler = Scheduler(pages, limits, hasher=hasher)
        self._depth = depth
        self._in_flight: deque[SchedulerOutput] = deque()
        self._lengths: dict[int, int] = {}  # output tokens by request id

    def add(self, request: RecordedRequest) -> None:
        self._lengths[request.request_id] = request.output_tokens
        self.scheduler.add(rank_request(request))

    def launch(self, step: SchedulerOutput) -> list[RequestUpdate]:
        self._in_flight.append(step)
        return self.commit_down_to(self._depth)

    def commit_down_to(self, depth: int) -> list[RequestUpdate]:
        updates: list[RequestUpdate] = []
        while len(self._in_flight) > depth:
            updates += self._commit(self._in_flight.popleft())
        return updates

    def _commit(self, step: SchedulerOutput) -> list[RequestUpdate]:
        request_ids = self.scheduler.table.request_ids[step.samples.req_indices].tolist()
        indices = step.samples.output_indices.tolist()
        tokens = tuple(
            STOP_TOKEN if index + 1 == self._lengths[request_id] else TOKEN
            for request_id, index in zip(request_ids, indices, strict=True)
        )
        return self.scheduler.commit(step, SampledTokens(tokens, (None,) * len(tokens)))


def rank_request(request: RecordedRequest) -> RankRequest:
    """Make a request of as many tokens as its rank had to compute."""
    num_tokens = request.prompt_tokens - request.cached_tokens
    prompt = (request.request_id + STOP_TOKEN + 1, *(TOKEN,) * (num_tokens - 1))
    params = SamplingParams(max_tokens=request.max_tokens)
    return RankRequest(request.request_id, prompt, params, 0, frozenset({STOP_TOKEN}))


@dataclass(frozen=True)
class SimulatedStep:
    shape: StepShape
    seconds: float  # as predicted; without a prediction 0


Predict = Callable[[StepShape], float]


class Simulation:
    """Requests come at their recorded steps, or with a prediction of times at their seconds."""

    def __init__(
        self, config: EngineConfig, sizes: ModelSizes, execution: ExecutionPolicy,
        budget: BudgetPolicy, depth: int, reroutes: bool, predict: Predict | None = None,
    ) -> None:  # fmt: skip
        """reroutes: choose ranks by the routing, else each request goes where it was."""
        allowed = "0: what a model accepts is not known of other steps"
        ok = not config.speculative_num_steps
        require(ok, "speculative_num_steps", config.speculative_num_steps, allowed)
        self._budget = budget
        self._execution, self._programs, self._predict = execution, config.programs, predict
        self._ranks = [SimulatedRank(config, sizes, depth) for _ in range(config.dp_size)]
        balancer, members = load_balancer(config.routing), Membership.first(config.dp_size)
        self._loads = RankLoads(balancer, members, config.page_size)
        self._demands: dict[int, Demand] = {}
        self._reroutes, self._depth = reroutes, depth
        self._step_us: deque[int] = deque([0] * (depth + 1))

    def run(self, requests: Sequence[RecordedRequest]) -> list[SimulatedStep]:
        by_step = self._predict is None
        times = [each.step if by_step else each.at_s for each in requests]
        waiting = deque(sorted(zip(times, range(len(requests))), key=lambda each: each))
        steps: list[SimulatedStep] = []
        now, budget = 0.0, None
        while waiting or any(rank.scheduler.has_work for rank in self._ranks):
            if not any(rank.scheduler.has_work for rank in self._ranks):
                now = max(now, waiting[0][0])
            while waiting and waiting[0][0] <= now:
                self._arrive(requests[waiting.popleft()[1]])
            step, budget = self._step(len(steps), budget)
            if step is not None:
                steps.append(step)
            if by_step:
                now += 1  # also after a turn in which no rank had rows: it has its number, too
            elif step is not None:
                now += step.seconds
        return steps

    def _arrive(self, request: RecordedRequest) -> None:
        dp_rank = request.dp_rank
        if self._reroutes:
            demand = self._demands[request.request_id] = Demand.of(rank_request(request), None)
            dp_rank = self._loads.take(demand)
        self._ranks[dp_rank].add(request)

    def _step(self, step_id: int, budget: int | None) -> tuple[SimulatedStep | None, int | None]:
        program: Program = self._programs[0]
        scheduled = [rank.scheduler.schedule(program, budget) for rank in self._ranks]
        step_us = self._step_us.popleft()
        records = tuple(
            StepRecord(
                0, step_id, 0, step.real_rows, rank.scheduler.queued_tokens,
                prefill_rows=step.prefill_rows, num_sampling=len(step.sampled), step_us=step_us,
            )
            for rank, step in zip(self._ranks, scheduled, strict=True)
        )  # fmt: skip
        agreement = agree(records, self._programs, execution=self._execution, budget=self._budget)
        budget = agreement.next_prefill_budget
        if agreement.idle:
            self._step_us.append(0)
            for rank in self._ranks:
                self._hear(rank.commit_down_to(0))
            return None, budget
        shape = StepShape(
            records,
            agreement.plans,
            tuple(kv_tokens(step.target) for step in scheduled),
            tuple(attended_tokens(step.target) for step in scheduled),
        )
        seconds = 0.0 if self._predict is None else self._predict(shape)
        self._step_us.append(round(seconds * 1e6))
        for rank, step in zip(self._ranks, scheduled, strict=True):
            self._hear(rank.launch(step))
        return SimulatedStep(shape, seconds), budget

    def _hear(self, updates: Sequence[RequestUpdate]) -> None:
        """Tell the routing of first tokens and ends."""
        for update in updates if self._reroutes else ():
            demand = self._demands[update.request_id]
            if update.token_ids and not update.first_index:
                self._loads.begun(demand)
            if update.finish_reason:
                self._loads.give_back(demand)
