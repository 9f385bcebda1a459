"""StepRunner: launches the passes of an agreed step, and samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import PageGeometry, Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.cache_spec import LayerState
from dp_runtime.core.device_copy import HostCopy, all_on_device, on_device
from dp_runtime.core.recurrent_metadata import AcceptedDrafts
from dp_runtime.core.step_program import Pass, Program
from dp_runtime.flight.recorder import FlightRecorder
from dp_runtime.layers.routing_buffer import RoutingBuffer
from dp_runtime.metrics.trace import PassTrace
from dp_runtime.models.model import Model, PassModel
from dp_runtime.parallel.agreement import Agreement
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.runner.drafting import Drafting
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs.pass_graphs import PassGraphs, PassOutput
from dp_runtime.runner.graphs.piecewise_graphs import PiecewiseGraphs
from dp_runtime.runner.image_encoding import ImageEncoding
from dp_runtime.runner.pass_runner import PassRunner
from dp_runtime.runner.state_copies import StateCopies
from dp_runtime.runner.step_timer import PassTimer
from dp_runtime.sampling.draft_verification import Verification
from dp_runtime.sampling.logprobs import Logprobs
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled, SampledTokens, Sampler
from dp_runtime.scheduler.scheduler_output import Chunk, SchedulerOutput
from dp_runtime.structured.masked_rows import MaskedRows
from dp_runtime.structured.structured_state import StructuredState


@dataclass(frozen=True, eq=False)
class CapturedGraphs:
    passes: Mapping[Pass, Mapping[int, PassGraphs]]  # by query length
    piecewise: Mapping[PassModel, PiecewiseGraphs] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class StepOutput:
    sampled: Sampled  # on its way to the host
    finite: HostCopy | None  # whether the last values of chunks that sample nothing are, if any do
    scores: tuple[Logprobs | Exception, ...]  # of each chunk that scores
    routed: HostCopy | None  # experts of the rows whose requests asked for them, if any did
    passes: tuple[PassTrace, ...]
    prepare_s: float
    sample_start_s: float
    sample_s: float
    encode_s: float  # of the host, for images

    def tokens(self) -> SampledTokens:
        """Wait for what the step gave."""
        tokens = self.sampled.to_host()
        if self.finite is None:
            return tokens
        lost: list[int] = np.flatnonzero(~self.finite.wait()[0].numpy()).tolist()
        return tokens._replace(not_finite=lost)


class StepRunner:
    """Launches whole steps: one pass's results reach the next before the host knows them."""

    def __init__(
        self,
        model: Model,
        drafting: Drafting | None,
        sampler: Sampler,
        structured: StructuredState,
        *,
        collective: RowCollective,
        pages: PageGeometry,
        num_state_slots: int,  # of the target's recurrent layers; a draft model has none
        states: Sequence[LayerState],  # of these layers
        device: torch.device,
        poison: bool,  # fill padded rows with NaN
        flight: FlightRecorder,
        routing: RoutingBuffer | None = None,  # where the model leaves the experts of its rows
        images: ImageEncoding | None = None,
    ) -> None:
        def pass_runner(of: PassModel) -> PassRunner:
            features = images.features if images else torch.zeros(0, 0, device=device)
            return PassRunner(
                model=of, pages=pages, collective=collective, poison=poison, flight=flight,
                device=device, image_features=features,
            )  # fmt: skip

        self.model = model
        self.drafting = drafting
        self.sampler, self.sample = sampler, sampler.sample
        self.structured = structured
        self.device = device
        self.collective = collective
        self.poison = poison
        self.flight = flight
        self.routing = routing
        self.images = images
        self.accepted_drafts = None
        if drafting is not None and num_state_slots:
            self.accepted_drafts = AcceptedDrafts(num_state_slots, device)
        self.copies = StateCopies(states, self.accepted_drafts, device)
        target = replace(
            pass_runner(model),
            num_state_slots=num_state_slots,
            accepted_drafts=self.accepted_drafts,
            routing=routing,
        )
        self.passes = {Pass.TARGET: target}
        if drafting is not None:
            self.passes[Pass.DRAFT] = pass_runner(drafting.model)
            self.passes[Pass.DRAFT_EXTEND] = pass_runner(drafting.model)
        self.last_sampled = torch.zeros(0, dtype=torch.int64, device=device)
        self._no_hidden = torch.zeros(0, 0, device=device)

    def use_graphs(self, captured: CapturedGraphs) -> None:
        self.passes = {
            pass_kind: replace(
                runner,
                graphs=captured.passes[pass_kind],
                piecewise=captured.piecewise.get(runner.model),
            )
            for pass_kind, runner in self.passes.items()
        }

    def graph_votes(self, scheduled: SchedulerOutput, program: Program) -> int:
        """Set bit n if this rank's rows of the program's pass n can be replayed."""
        votes = 0
        for index, (pass_kind, batch) in enumerate(zip(program.passes, scheduled.batches)):
            # A target's graph ends with the logits of all its rows.
            all_sample = pass_kind is not Pass.TARGET or len(scheduled.samples) == batch.num_tokens
            if all_sample and self.passes[pass_kind].fits_graph(
                program.query_len(pass_kind), batch
            ):
                votes |= 1 << index
        return votes

    @property
    def may_run_ahead(self) -> bool:
        """Tell whether a step can be scheduled before the last one is committed."""
        # Tokens that are drawn, penalised or scored depend on output indices, of which the host has
        # only upper bounds while a verification is in flight.
        return self.drafting is None or self.sampler.all_plain

    @torch.inference_mode()
    def clear_pages(self, pages: Sequence[int]) -> None:
        """Zero pages that a request left with values that may not be finite, in stream order."""
        if pages:
            for model in {runner.model for runner in self.passes.values()}:
                model.backend.clear_pages(pages)

    @torch.inference_mode()
    def run(self, scheduled: SchedulerOutput, agreement: Agreement, graph_votes: int) -> StepOutput:
        """Build metadata, run every pass of the program and sample, without waiting for any.

        graph_votes: those of this rank's record.
        """
        own = scheduled, agreement, graph_votes
        step = _LaunchedStep(self.passes, self.collective, self.flight, *own)
        if self.images is not None:
            step.encode_s = self.images.encode(scheduled.to_encode)
        self.copies.before(scheduled.states)
        run = self.run_speculative if agreement.program.num_drafts else self.run_plain
        output = run(step)
        self.copies.after(scheduled.states)
        return output

    def run_plain(self, step: _LaunchedStep) -> StepOutput:
        future = FutureTokens(self.last_sampled, self._no_hidden)
        masked = self.structured.begin(step.scheduled.samples)
        output = step.run_pass(0, future)
        return step.output(*self._sample(step, 0, output, masked, None))

    def run_speculative(self, step: _LaunchedStep) -> StepOutput:
        """Draft, verify all drafts in the target pass, and begin the drafts of the next step."""
        drafting, batches = self.drafting, step.scheduled.batches
        assert drafting is not None, f"{step.agreement.program} on a rank without a draft model"
        target, extend = len(batches) - 2, len(batches) - 1
        chains = drafting.begin(step.scheduled.decodes, batches[target])
        for index in range(target):
            chains = drafting.extend(chains, step.run_pass(index, chains.next_inputs))
        future = FutureTokens(chains.rows, self._no_hidden, chains.num_rejected)
        verification = drafting.verification(chains)
        masked = self.structured.begin(step.scheduled.samples, verification)
        verified = step.run_pass(target, future)
        sampled, scores = self._sample(step, target, verified, masked, verification)
        future = drafting.extend_inputs(verified, sampled.token_ids, chains)
        extended = step.run_pass(extend, future)
        drafting.keep(step.scheduled, batches[extend], sampled, extended)
        return step.output(sampled, scores)

    def _sample(
        self,
        step: _LaunchedStep,
        index: int,
        output: PassOutput,
        masked: MaskedRows | None,
        verification: Verification | None,
    ) -> tuple[Sampled, list[Logprobs | Exception]]:
        started = perf_counter()
        self.flight.sample()
        logits, scores = output.logits, list[Logprobs | Exception]()
        scheduled = step.scheduled
        if logits is None:
            hidden, first = output.hidden.last, len(scheduled.samples)
            own = scheduled.batches[index].sample_rows, scheduled.unsampled_rows
            rows, unsampled = all_on_device(own, self.device)
            if len(unsampled):
                step.finite = HostCopy(hidden[unsampled].isfinite().all(-1))
            for chunk in scheduled.scored:
                count = chunk.score_end - chunk.score_start
                scores.append(self._score(hidden[rows[first : first + count]], chunk))
                first += count
            logits = RowLogits.from_logits(
                self.model.logits(hidden[rows[: len(scheduled.samples)]])
            )
        masks = self.structured.masks(masked)
        sampled = self.sample(logits, scheduled.samples, verification, masks)
        self.structured.sampled(masked, sampled)
        if len(scheduled.routed.rows):
            assert self.routing is not None, "experts of tokens are asked for, and not kept"
            step.routed = self.routing.copy_rows(scheduled.routed.rows)
        self.last_sampled = sampled.token_ids
        self._count_accepted(scheduled.batches[index], sampled.num_accepted)
        step.sample_start_s, step.sample_s = started, perf_counter() - started
        return sampled, scores

    def _count_accepted(self, batch: LocalBatch, num_accepted: Tensor | None) -> None:
        """Tell recurrent states which of the drafts behind them are tokens now."""
        if self.accepted_drafts is not None and batch.num_requests:
            (slots,) = all_on_device([batch.states.slots], self.device)
            self.accepted_drafts.write(slots, num_accepted)

    def _score(self, hidden: Tensor, chunk: Chunk) -> Logprobs | Exception:
        """Score a chunk's prompt rows; what fails here concerns its request alone."""
        request = chunk.state.request
        following = request.prompt_token_ids[chunk.score_start + 1 : chunk.score_end + 1]
        try:
            return self.sampler.prompt_logprobs(
                lambda some: self.model.logits(hidden[some]).float(),
                on_device(np.array(following, np.int64), self.device),
                request.params.prompt_logprobs or 0,
            )
        except Exception as error:
            return error


@dataclass(eq=False)
class _LaunchedStep:
    passes: Mapping[Pass, PassRunner]
    collective: RowCollective
    flight: FlightRecorder
    scheduled: SchedulerOutput
    agreement: Agreement
    graph_votes: int  # bit n: this rank's rows of pass n fit a captured graph
    traces: list[PassTrace] = field(default_factory=list)
    encode_s: float = 0.0
    prepare_s: float = 0.0
    sample_start_s: float = 0.0
    sample_s: float = 0.0
    finite: HostCopy | None = None
    routed: HostCopy | None = None

    def run_pass(self, index: int, future: FutureTokens) -> PassOutput:
        timer = PassTimer(self.collective)
        self.flight.begin_pass(index)
        pass_kind, plan = self.agreement.program.passes[index], self.agreement.plans[index]
        place = Place(self.flight.ring.dp_rank, self.agreement.step_id, pass_kind)
        runner = self.passes[pass_kind]
        fits_graph = self.graph_votes >> index & 1 == 1
        output = runner.run(plan, self.scheduled.batches[index], future, place, timer, fits_graph)
        self.flight.end_pass()
        self.traces.append(timer.trace(pass_kind, plan, runner.model.num_moe_layers))
        self.prepare_s += timer.prepare_s
        return output

    def output(self, sampled: Sampled, scores: Sequence[Logprobs | Exception]) -> StepOutput:
        return StepOutput(
            sampled, self.finite, tuple(scores), self.routed, tuple(self.traces), self.prepare_s,
            self.sample_start_s, self.sample_s, self.encode_s,
        )  # fmt: skip
