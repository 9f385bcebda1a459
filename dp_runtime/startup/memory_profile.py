"""The largest step the limits allow, run on all ranks before they serve.

It loads every kernel and connects every collective before the first request, and its peak is the
measured need for activations. Nothing of it stays: requests, sampler and recorder are its own, no
step id is used, and the pages and states it wrote are zeroed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.per_request_state import PerRequestState
from dp_runtime.core.request import RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.flight.recorder import FlightRecorder
from dp_runtime.metrics.memory import MemoryUse
from dp_runtime.metrics.totals import Recorder
from dp_runtime.parallel.agreement import Agreement, StepRecord, agree
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_runner import StepRunner
from dp_runtime.runner.step_timer import StepTimer
from dp_runtime.runner.step_tracing import InflightStep
from dp_runtime.sampling.sampler import Sampler
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from dp_runtime.startup.device_memory import allocated_bytes
from dp_runtime.startup.loaded_rank import LoadedRank
from dp_runtime.startup.memory_estimate import param_bytes

NUM_STEPS = 2  # all prompts at once, then a decode of all requests


def run_largest_steps(loop: StepLoop, loaded: LoadedRank) -> None:
    """Run max_num_tokens rows, then decodes, with everything a request can ask for, on all ranks.

    All but the first rank have a row less, so that the MoE stage pads as in most steps.
    """
    pages, runner = loop.scheduler.pages, loop.runner
    limits, drafting = loop.scheduler.limits, runner.drafting
    sampler = Sampler(loop.sampler.vocab_size, limits.num_table_rows, runner.device)
    states: list[PerRequestState] = [sampler]
    if drafting is not None:
        states.append(drafting.state)
    scheduler = Scheduler(pages, limits, states)
    dp_rank, position = loop.coordinator.dp_rank, loop.coordinator.collective.dp_rank
    trial_runner = StepRunner(
        runner.model,
        drafting,
        sampler,
        runner.structured,
        collective=runner.collective,
        pages=pages,
        num_state_slots=limits.num_state_slots,
        states=loaded.states,
        device=runner.device,
        poison=runner.poison,
        flight=FlightRecorder.in_process(dp_rank, runner.flight.ring.layout),
        routing=runner.routing,
        images=runner.images,
    )
    trial = StepLoop(scheduler, loop.coordinator, trial_runner, Recorder(dp_rank))
    if runner.images is not None:
        runner.images.encode_most()
    for request in largest_load(scheduler.limits, scheduler.pages, position, sampler.vocab_size):
        scheduler.add(request)
    last_page = last_slot = 0
    for _ in range(NUM_STEPS):
        scheduled = scheduler.schedule(loop.coordinator.program)
        tables = [batch.page_table for batch in scheduled.batches]
        last_page = max(last_page, *(int(table.max(initial=0)) for table in tables))
        last_slot = max(last_slot, int(scheduled.target.states.slots.max(initial=0)))
        agreement = _agree(loop, scheduled)
        if not agreement.idle:
            output = trial_runner.run(scheduled, agreement, graph_votes=0)  # none is captured yet
            timer = StepTimer(loop.coordinator.board)
            record = StepRecord(agreement.epoch, agreement.step_id, 0, scheduled.real_rows)
            trial.commit(InflightStep(scheduled, agreement, record, output, timer))
    for pool in loaded.pools:
        pool[: last_page + 1].zero_()
    for tensor in chain.from_iterable(loaded.states):
        tensor[: last_slot + 1].zero_()


def _agree(loop: StepLoop, scheduled: SchedulerOutput) -> Agreement:
    """Agree as the step board would, without using up one of its turns."""
    coordinator = loop.coordinator
    records = [
        StepRecord(coordinator.epoch, coordinator.step_id, 0, rows)
        for rows in coordinator.collective.all_gather_ints(scheduled.real_rows)
    ]
    return agree(records, (coordinator.program,), execution=coordinator.execution)


def largest_load(
    limits: Limits, pages: PageGeometry, position: int, vocab_size: int
) -> Iterator[RankRequest]:
    """Fill a step with prompts: the first as long as can be, the others of one token."""
    rows = max(1, limits.max_num_tokens - (position > 0))
    free_pages = pages.num_pages - 1
    count = min(limits.max_num_requests, rows)
    for number in range(count):
        longest = min(limits.max_model_len - 1, free_pages * pages.page_size - NUM_STEPS)
        length = min(rows - (count - number - 1), longest)
        if length < 1:
            return
        rows -= length
        free_pages -= -(-(length + NUM_STEPS) // pages.page_size)
        prompt = tuple((number + position) % vocab_size for position in range(length))
        yield RankRequest(number, prompt, _params(number == 0), number, frozenset({0}))


def _params(scored: bool) -> SamplingParams:
    return SamplingParams(
        max_tokens=NUM_STEPS,
        min_tokens=NUM_STEPS,
        temperature=0.8,
        top_k=50,
        top_p=0.95,
        min_p=0.01,
        presence_penalty=0.1,
        frequency_penalty=0.1,
        repetition_penalty=1.1,
        logit_bias={0: 1.0},
        logprobs=1,
        prompt_logprobs=1 if scored else None,
    )


def profile(loop: StepLoop, loaded: LoadedRank) -> MemoryUse:
    """Run the largest steps on a GPU rank, with all others, and measure the memory in use."""
    device = loop.runner.device
    torch.cuda.reset_peak_memory_stats(device)
    try:
        run_largest_steps(loop, loaded)
        torch.cuda.synchronize(device)
    except BaseException as error:
        loop.coordinator.abort(f"{type(error).__name__}: {error}")
        raise
    after, weights = allocated_bytes(device), param_bytes(loaded.models)
    pages = sum(pool.nbytes for pool in loaded.pools)
    states = sum(tensor.nbytes for state in loaded.states for tensor in state)
    images = loop.runner.images
    features = 0 if images is None else images.features.nbytes
    return MemoryUse(
        weights=weights,
        workspaces=after - loaded.allocated_before - weights - pages - states - features,
        activations=torch.cuda.max_memory_allocated(device) - after,
        kv_cache=pages,
        recurrent_state=states,
        image_features=features,
    )
