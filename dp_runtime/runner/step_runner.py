"""StepRunner: runs the passes of an agreed step on the device, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.metadata import PageGeometry, Place
from dp_runtime.core.program import Pass
from dp_runtime.core.transfer import all_on_device, on_device
from dp_runtime.metrics.trace import PassTrace
from dp_runtime.models.causal_lm import Hidden
from dp_runtime.models.model import Model, PassModel
from dp_runtime.parallel.agreement import Agreement
from dp_runtime.parallel.coordinator import StepCoordinator
from dp_runtime.runner.drafting import DraftChains, Drafting
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs import PassGraphs, PassOutput
from dp_runtime.runner.pass_runner import PassRunner
from dp_runtime.runner.piecewise_graphs import PiecewiseGraphs
from dp_runtime.sampling.logprobs import Logprobs
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled, Sampler
from dp_runtime.scheduler.scheduler_output import Chunk, SchedulerOutput


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a launched step will give, and the seconds that launching it took."""

    sampled: Sampled
    scores: tuple[Logprobs, ...]
    passes: tuple[PassTrace, ...]
    prepare_s: float
    sample_s: float


class StepRunner:
    """Launches the forwards of a step's passes, in each of which this rank has any rows or none.

    What one pass gives the next stays on the device: drafts are verified, and what is accepted is
    drafted from, before the host knows either.
    """

    def __init__(
        self,
        model: Model,
        drafting: Drafting | None,
        sampler: Sampler,
        coordinator: StepCoordinator,
        pages: PageGeometry,
        device: torch.device,
    ) -> None:
        self.model = model
        self.drafting = drafting
        self.sampler = sampler
        self.coordinator = coordinator
        self.device = device
        self.passes = {Pass.TARGET: PassRunner(model, pages, device)}
        if drafting is not None:
            self.passes[Pass.DRAFT] = PassRunner(drafting.model, pages, device)
            self.passes[Pass.DRAFT_EXTEND] = PassRunner(drafting.model, pages, device)
        self._last_sampled = torch.zeros(0, dtype=torch.int64, device=device)
        self._no_hidden = torch.zeros(0, 0, device=device)

    def use_graphs(
        self,
        graphs: Mapping[Pass, Mapping[int, PassGraphs]],
        stages: Mapping[PassModel, PiecewiseGraphs],
    ) -> None:
        """Replay captured graphs from now on, by query length, wherever all ranks' rows fit them.

        In other steps a pass's MoE stages are replayed, if all ranks' rows fit those.
        """
        for pass_kind, runner in self.passes.items():
            runner.graphs, runner.stages = graphs[pass_kind], stages[runner.model]
        self.coordinator.buckets = {
            (pass_kind, length): some.buckets
            for pass_kind, by_length in graphs.items()
            for length, some in by_length.items()
        }
        self.coordinator.stages = stages[self.model].buckets

    def graph_votes(self, scheduled: SchedulerOutput) -> int:
        """Bit n: this rank's rows of the next step's pass n can be replayed.

        A target's graph ends with the logits of all its rows.
        """
        program, votes = self.coordinator.program, 0
        for index, (pass_kind, batch) in enumerate(zip(program.passes, scheduled.batches)):
            all_sample = pass_kind is not Pass.TARGET or len(scheduled.samples) == batch.num_tokens
            if all_sample and self.passes[pass_kind].fits_graph(
                program.query_len(pass_kind), batch
            ):
                votes |= 1 << index
        return votes

    @property
    def may_run_ahead(self) -> bool:
        """Whether a step can be scheduled before the one before it is committed.

        What is drawn, penalised or scored goes by output indices, which the host does not know
        while it knows bounds only.
        """
        return self.drafting is None or self.sampler.all_plain

    @torch.inference_mode()
    def launch(self, scheduled: SchedulerOutput, agreement: Agreement) -> StepOutput:
        """Run every pass of the program, and sample where the target ran."""
        forwards, drafting = _Forwards(self, scheduled, agreement), self.drafting
        chains = None
        if drafting is not None and scheduled.num_drafts:
            target = agreement.program.passes.index(Pass.TARGET)
            chains = drafting.begin(scheduled.decodes, scheduled.batches[target])
        for index, pass_kind in enumerate(agreement.program.passes):
            match pass_kind, drafting, chains:
                case Pass.DRAFT, Drafting(), DraftChains():
                    chains = drafting.extend(chains, forwards.run(index, chains.pending))
                case Pass.TARGET, _, _:
                    pending = FutureTokens(self._last_sampled, self._no_hidden)
                    if chains is not None:
                        pending = FutureTokens(chains.rows, self._no_hidden, chains.num_rejected)
                    output = forwards.run(index, pending)
                    at_sample = perf_counter()
                    sampled, scores = self._sample(output, scheduled, index, chains)
                    sample_s = perf_counter() - at_sample
                case Pass.DRAFT_EXTEND, Drafting(), DraftChains():
                    pending = drafting.features(output, sampled.token_ids, chains)
                    output = forwards.run(index, pending)
                    drafting.keep(scheduled, scheduled.batches[index], sampled, output)
                case _:
                    raise AssertionError(f"{agreement.program} on a rank without a draft model")
        self._last_sampled = sampled.token_ids
        traces, prepare_s = tuple(forwards.traces), forwards.prepare_s
        return StepOutput(sampled, scores, traces, prepare_s, sample_s)

    def _sample(
        self, output: PassOutput, scheduled: SchedulerOutput, index: int, chains: DraftChains | None
    ) -> tuple[Sampled, tuple[Logprobs, ...]]:
        """From hidden states, or from the logits of a batch that is all samples."""
        verification = None
        if self.drafting is not None and chains is not None:
            verification = self.drafting.verification(chains)
        samples = scheduled.samples
        if output.logits is not None:
            return self.sampler.choose(output.logits, samples, verification), ()
        hidden = output.hidden.last
        (rows,) = all_on_device([scheduled.batches[index].sample_rows], self.device)
        first = len(samples)
        scores = []
        for chunk in scheduled.scored:
            count = chunk.score_end - chunk.score_start
            scores.append(self._score(hidden[rows[first : first + count]], chunk))
            first += count
        logits = RowLogits.of(self.model.logits(hidden[rows[: len(samples)]]))
        return self.sampler.choose(logits, samples, verification), tuple(scores)

    def _score(self, hidden: Tensor, chunk: Chunk) -> Logprobs:
        """Log probabilities of the tokens that follow a prompt's rows [n, hidden]."""
        request = chunk.live.request
        following = request.prompt_token_ids[chunk.score_start + 1 : chunk.score_end + 1]
        return self.sampler.prompt_logprobs(
            lambda some: self.model.logits(hidden[some]).float(),
            on_device(np.array(following, np.int64), self.device),
            request.params.prompt_logprobs or 0,
        )


def _nothing(pending: FutureTokens) -> PassOutput:
    """No rank has a row in a draft pass: no forward runs."""
    return PassOutput(Hidden(pending.hidden, pending.hidden), None)


@dataclass(eq=False)
class _Forwards:
    """The forwards of one step as they are launched, pass by pass."""

    runner: StepRunner
    scheduled: SchedulerOutput
    agreement: Agreement
    traces: list[PassTrace] = field(default_factory=list)
    prepare_s: float = 0.0

    def run(self, index: int, pending: FutureTokens) -> PassOutput:
        """The forward of the program's pass number `index`."""
        at_prepare = perf_counter()
        agreement, coordinator = self.agreement, self.runner.coordinator
        pass_kind, batch = agreement.program.passes[index], self.scheduled.batches[index]
        place = Place(coordinator.collective.dp_rank, agreement.step_id, pass_kind)
        exchange = coordinator.exchange(agreement, index)
        runner = self.runner.passes[pass_kind]
        forward: Callable[[], PassOutput]
        if not any(agreement.real_rows[index]):
            forward = partial(_nothing, pending)
        elif agreement.graphs[index]:
            length = agreement.program.query_len(pass_kind)
            forward = runner.prepare_graph(length, batch, exchange.plan, pending, place)
        else:
            forward = runner.prepare(batch, exchange, pending, place)
        start, waited = perf_counter(), coordinator.collective.waited_s
        output = forward()
        plan = exchange.plan
        self.traces.append(
            PassTrace(
                pass_kind=pass_kind,
                real_rows=plan.real_rows,
                gathered_rows=plan.gathered_rows,
                wire_rows=plan.wire_rows * 2 * runner.model.num_moe_layers,
                forward_s=perf_counter() - start,
                wait_s=coordinator.collective.waited_s - waited,
            )
        )
        self.prepare_s += start - at_prepare
        return output
