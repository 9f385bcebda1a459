"""One rank's step, from schedule to commit, and the loop that repeats it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from time import monotonic, perf_counter

import numpy as np
import torch
from torch import Tensor

from dp_runtime.agreement import Agreement, FaultBits
from dp_runtime.batch import LocalBatch
from dp_runtime.batch_builder import Chunk
from dp_runtime.coordinator import RankLoad, StepCoordinator
from dp_runtime.graphs import DecodeGraphs
from dp_runtime.layers.moe import RowExchange
from dp_runtime.logprobs import Logprobs
from dp_runtime.metadata import AttentionMetadata, Place
from dp_runtime.models import Model, SlotInputs
from dp_runtime.program import Slot
from dp_runtime.request import RankRequest, RequestProgress
from dp_runtime.row_logits import RowLogits
from dp_runtime.sampling import Sampled, Sampler
from dp_runtime.scheduler import Scheduled, Scheduler, StepTokens
from dp_runtime.stage_graphs import StageGraphs
from dp_runtime.trace import Recorder, SlotTrace, StepTrace
from dp_runtime.transfer import all_on_device, on_device

IDLE_S = 1.0


@dataclass(frozen=True, eq=False)
class Commands:
    """What came in for a rank since its last step."""

    add: Sequence[RankRequest] = ()
    abort: Sequence[int] = ()
    stop: bool = False


@dataclass(frozen=True)
class PhaseTimes:
    """When a step began, and the seconds its phases took."""

    started: float
    schedule_s: float
    agree_s: float
    agree_wait_s: float
    prepare_s: float = 0.0
    sample_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Launched:
    """A step whose results the host has not looked at yet."""

    scheduled: Scheduled
    agreement: Agreement
    sampled: Sampled
    scores: tuple[Logprobs, ...]
    slots: tuple[SlotTrace, ...]
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
        models: Mapping[Slot, Model],
        sampler: Sampler,
        recorder: Recorder,
        device: torch.device,
        depth: int = 0,
    ) -> None:
        self.scheduler = scheduler
        self.coordinator = coordinator
        self.models = models
        self.sampler = sampler
        self.recorder = recorder
        self.device = device
        self.depth = depth
        self.graphs: Mapping[Slot, DecodeGraphs] = {}
        self.stages: Mapping[Slot, StageGraphs] = {}
        self.last_finished = (-1, monotonic())  # step id, when
        self.idle = threading.Event()
        self._last_sampled = torch.zeros(0, dtype=torch.int64, device=device)
        self._dp_rank = coordinator.collective.dp_rank

    def run(
        self,
        take: Callable[[], Commands],
        deliver: Callable[[list[RequestProgress]], None],
    ) -> None:
        """Step until all ranks agree to stop; an exception frees the other ranks first."""
        try:
            self._run(take, deliver)
        except BaseException as error:
            self.coordinator.abort(f"{type(error).__name__}: {error}")
            raise

    def _run(
        self,
        take: Callable[[], Commands],
        deliver: Callable[[list[RequestProgress]], None],
    ) -> None:
        in_flight: deque[Launched] = deque()
        while True:
            commands = take()
            deliver(self._apply(commands))
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

    def _agree(self, stop: bool) -> tuple[Scheduled, Agreement, PhaseTimes]:
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

    def _apply(self, commands: Commands) -> list[RequestProgress]:
        for request in commands.add:
            self.sampler.add(request)
            self.scheduler.add(request)
        ended = [self.scheduler.abort(request_id) for request_id in commands.abort]
        progress = [item for item in ended if item]
        for item in progress:
            self.sampler.remove(item.request_id)
        return progress

    def _load(self, scheduled: Scheduled) -> RankLoad:
        return RankLoad(
            num_requests=len(self.scheduler.running),
            free_pages=self.scheduler.allocator.num_free,
            queued_tokens=self.scheduler.queued_tokens,
            wants_prefill=scheduled.prefill,
            graph_vote=self._fits_graphs(scheduled),
        )

    def _fits_graphs(self, scheduled: Scheduled) -> bool:
        slots = self.coordinator.program.slots
        return bool(self.graphs) and all(
            self.graphs[slot].covers(batch) and len(scheduled.samples) == batch.num_tokens
            for slot, batch in zip(slots, scheduled.batches)
        )

    def use_graphs(self, slot: Slot, graphs: DecodeGraphs, stages: StageGraphs) -> None:
        """Replay a slot's captured graphs from now on, wherever all ranks' rows fit them.

        In other steps its MoE stages are replayed, if all ranks' rows fit those.
        """
        self.graphs, self.stages = {**self.graphs, slot: graphs}, {**self.stages, slot: stages}
        self.coordinator.buckets, self.coordinator.stages = graphs.buckets, stages.buckets

    @torch.inference_mode()
    def launch(self, scheduled: Scheduled, agreement: Agreement, times: PhaseTimes) -> Launched:
        """Run every slot of the program, and sample where the target ran."""
        slots, prepare_s = [], 0.0
        for index, slot in enumerate(agreement.program.slots):
            batch = scheduled.batches[index]
            at_prepare = perf_counter()
            place = Place(self._dp_rank, agreement.step_id, slot)
            exchange = self.coordinator.exchange(agreement, index)
            run = (self._replay if agreement.graph else self._eager)(slot, batch, exchange, place)
            prepare_s += perf_counter() - at_prepare
            output, slot_trace = self._forward(slot, run, exchange)
            slots.append(slot_trace)
            if slot is Slot.TARGET:
                at_sample = perf_counter()
                sampled, scores = self._sample(self.models[slot], output, batch, scheduled)
                sample_s = perf_counter() - at_sample
        self._last_sampled = sampled.token_ids
        times = replace(times, prepare_s=prepare_s, sample_s=sample_s)
        return Launched(scheduled, agreement, sampled, scores, tuple(slots), times)

    def _inputs(self, batch: LocalBatch) -> SlotInputs:
        pending = batch.token_sources >= 0
        rows, sources = pending.nonzero()[0], batch.token_sources[pending]
        arrays = (batch.token_ids, batch.positions, batch.embed_rows, batch.embeds, rows, sources)
        inputs = all_on_device(arrays, self.device)
        token_ids, positions, embed_rows, embeds, device_rows, device_sources = inputs
        if len(rows):
            token_ids[device_rows] = self._last_sampled[device_sources]
        return SlotInputs(token_ids, positions, embed_rows, embeds)

    def _eager(
        self, slot: Slot, batch: LocalBatch, exchange: RowExchange, place: Place
    ) -> Callable[[], Tensor | RowLogits]:
        """The forward of a slot, its inputs on the device; MoE stages perhaps from graphs."""
        metadata = AttentionMetadata.build(batch, self.scheduler.pages, place, self.device)
        inputs = self._inputs(batch)
        model, stages = self.models[slot], self.stages.get(slot)
        if stages is not None and stages.covers(exchange.plan):
            return lambda: stages.forward(inputs, metadata, exchange).last
        return lambda: model.forward(inputs, metadata, exchange).last

    def _replay(
        self, slot: Slot, batch: LocalBatch, exchange: RowExchange, place: Place
    ) -> Callable[[], Tensor | RowLogits]:
        """The same from a captured graph, up to the logits."""
        sampled = self._last_sampled
        return lambda: self.graphs[slot].replay(batch, exchange.plan, sampled, place)

    def _forward(
        self, slot: Slot, run: Callable[[], Tensor | RowLogits], exchange: RowExchange
    ) -> tuple[Tensor | RowLogits, SlotTrace]:
        model, collective = self.models[slot], self.coordinator.collective
        start, waited = perf_counter(), collective.waited_s
        output = run()
        trace = SlotTrace(
            slot=slot,
            real_rows=exchange.plan.real_rows,
            gathered_rows=exchange.plan.gathered_rows,
            wire_rows=exchange.plan.wire_rows * 2 * model.num_moe_layers,
            forward_s=perf_counter() - start,
            wait_s=collective.waited_s - waited,
        )
        return output, trace

    def _sample(
        self, model: Model, output: Tensor | RowLogits, batch: LocalBatch, scheduled: Scheduled
    ) -> tuple[Sampled, tuple[Logprobs, ...]]:
        """From what a forward gave: hidden states, or the logits of a batch that is all samples."""
        if isinstance(output, RowLogits):
            return self.sampler.choose(output, scheduled.samples), ()
        (rows,) = all_on_device([batch.sample_rows], self.device)
        first = len(scheduled.samples)
        scores = []
        for chunk in scheduled.scored:
            count = chunk.score_end - chunk.score_start
            scores.append(self._score(model, output[rows[first : first + count]], chunk))
            first += count
        logits = model.logits(output[rows[: len(scheduled.samples)]])
        return self.sampler.sample(logits, scheduled.samples), tuple(scores)

    def _score(self, model: Model, hidden: Tensor, chunk: Chunk) -> Logprobs:
        """Log probabilities of the tokens that follow a prompt's rows [n, hidden]."""
        request = chunk.live.request
        following = request.prompt_token_ids[chunk.score_start + 1 : chunk.score_end + 1]
        return self.sampler.prompt_logprobs(
            lambda some: model.logits(hidden[some]).float(),
            on_device(np.array(following, np.int64), self.device),
            request.params.prompt_logprobs or 0,
        )

    def commit(self, step: Launched) -> list[RequestProgress]:
        """Look at what the step sampled, and move its requests on."""
        at = perf_counter()
        step.sampled.copy.wait()
        self.coordinator.collective.check()  # an abort may have ended the step's kernels
        sampled = step.sampled.to_host()
        scores = [score.to_host() for score in step.scores]
        tokens = StepTokens(sampled.token_ids, sampled.logprobs, scores)
        progress = self.scheduler.commit(step.scheduled, tokens)
        for item in progress:
            if item.finish_reason:
                self.sampler.remove(item.request_id)
        self._record(step, progress, perf_counter() - at)
        return progress

    def _record(self, step: Launched, progress: list[RequestProgress], commit_s: float) -> None:
        times = step.times
        new_tokens = sum(len(item.token_ids) for item in progress)
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
                prepare_s=times.prepare_s,
                sample_s=times.sample_s,
                commit_s=commit_s,
                slots=step.slots,
                output_tokens=new_tokens,
                prompt_tokens=sum(chunk.prompt_tokens for chunk in step.scheduled.chunks),
            )
        )
        self.last_finished = (step.agreement.step_id, monotonic())
