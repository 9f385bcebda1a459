"""StepRunner: runs the slots of an agreed step on the device, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dp_runtime.agreement import Agreement
from dp_runtime.coordinator import StepCoordinator
from dp_runtime.graphs import SlotGraphs, SlotOutput
from dp_runtime.logprobs import Logprobs
from dp_runtime.metadata import PageGeometry, Place
from dp_runtime.models import Hidden, Model, SlotModel
from dp_runtime.pending import Pending
from dp_runtime.program import Slot
from dp_runtime.row_logits import RowLogits
from dp_runtime.sampling import Sampled, Sampler
from dp_runtime.scheduled import Chunk, Scheduled
from dp_runtime.slot_runner import SlotRunner
from dp_runtime.speculative.drafting import DraftChains, Drafting
from dp_runtime.stage_graphs import StageGraphs
from dp_runtime.trace import SlotTrace
from dp_runtime.transfer import all_on_device, on_device


@dataclass(frozen=True, eq=False)
class StepOutput:
    """What a launched step will give, and the seconds that launching it took."""

    sampled: Sampled
    scores: tuple[Logprobs, ...]
    slots: tuple[SlotTrace, ...]
    prepare_s: float
    sample_s: float


class StepRunner:
    """Launches the forwards of a step's slots, in each of which this rank has any rows or none.

    What one slot gives the next stays on the device: drafts are verified, and what is accepted is
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
        self.slots = {Slot.TARGET: SlotRunner(model, pages, device)}
        if drafting is not None:
            self.slots[Slot.DRAFT] = SlotRunner(drafting.model, pages, device)
            self.slots[Slot.DRAFT_EXTEND] = SlotRunner(drafting.model, pages, device)
        self._last_sampled = torch.zeros(0, dtype=torch.int64, device=device)
        self._no_hidden = torch.zeros(0, 0, device=device)

    def use_graphs(
        self,
        graphs: Mapping[Slot, Mapping[int, SlotGraphs]],
        stages: Mapping[SlotModel, StageGraphs],
    ) -> None:
        """Replay captured graphs from now on, by query length, wherever all ranks' rows fit them.

        In other steps a slot's MoE stages are replayed, if all ranks' rows fit those.
        """
        for slot, runner in self.slots.items():
            runner.graphs, runner.stages = graphs[slot], stages[runner.model]
        self.coordinator.buckets = {
            (slot, length): some.buckets
            for slot, by_length in graphs.items()
            for length, some in by_length.items()
        }
        self.coordinator.stages = stages[self.model].buckets

    def graph_votes(self, scheduled: Scheduled) -> int:
        """Bit n: this rank's rows of the next step's slot n can be replayed.

        A target's graph ends with the logits of all its rows.
        """
        program, votes = self.coordinator.program, 0
        for index, (slot, batch) in enumerate(zip(program.slots, scheduled.batches)):
            all_sample = slot is not Slot.TARGET or len(scheduled.samples) == batch.num_tokens
            if all_sample and self.slots[slot].fits_graph(program.query_len(slot), batch):
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
    def launch(self, scheduled: Scheduled, agreement: Agreement) -> StepOutput:
        """Run every slot of the program, and sample where the target ran."""
        forwards, drafting = _Forwards(self, scheduled, agreement), self.drafting
        chains = None
        if drafting is not None and scheduled.num_drafts:
            target = agreement.program.slots.index(Slot.TARGET)
            chains = drafting.begin(scheduled.decodes, scheduled.batches[target])
        for index, slot in enumerate(agreement.program.slots):
            match slot, drafting, chains:
                case Slot.DRAFT, Drafting(), DraftChains():
                    chains = drafting.extend(chains, forwards.run(index, chains.pending))
                case Slot.TARGET, _, _:
                    pending = Pending(self._last_sampled, self._no_hidden)
                    if chains is not None:
                        pending = Pending(chains.rows, self._no_hidden, chains.lag)
                    output = forwards.run(index, pending)
                    at_sample = perf_counter()
                    sampled, scores = self._sample(output, scheduled, index, chains)
                    sample_s = perf_counter() - at_sample
                case Slot.DRAFT_EXTEND, Drafting(), DraftChains():
                    pending = drafting.features(output, sampled.token_ids, chains)
                    output = forwards.run(index, pending)
                    drafting.keep(scheduled, scheduled.batches[index], sampled, output)
                case _:
                    raise AssertionError(f"{agreement.program} on a rank without a draft model")
        self._last_sampled = sampled.token_ids
        traces, prepare_s = tuple(forwards.traces), forwards.prepare_s
        return StepOutput(sampled, scores, traces, prepare_s, sample_s)

    def _sample(
        self, output: SlotOutput, scheduled: Scheduled, index: int, chains: DraftChains | None
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


def _nothing(pending: Pending) -> SlotOutput:
    """No rank has a row in a draft slot: no forward runs."""
    return SlotOutput(Hidden(pending.hidden, pending.hidden), None)


@dataclass(eq=False)
class _Forwards:
    """The forwards of one step as they are launched, slot by slot."""

    runner: StepRunner
    scheduled: Scheduled
    agreement: Agreement
    traces: list[SlotTrace] = field(default_factory=list)
    prepare_s: float = 0.0

    def run(self, index: int, pending: Pending) -> SlotOutput:
        """The forward of the program's slot number `index`."""
        at_prepare = perf_counter()
        agreement, coordinator = self.agreement, self.runner.coordinator
        slot, batch = agreement.program.slots[index], self.scheduled.batches[index]
        place = Place(coordinator.collective.dp_rank, agreement.step_id, slot)
        exchange = coordinator.exchange(agreement, index)
        runner = self.runner.slots[slot]
        forward: Callable[[], SlotOutput]
        if not any(agreement.real_rows[index]):
            forward = partial(_nothing, pending)
        elif agreement.graphs[index]:
            length = agreement.program.query_len(slot)
            forward = runner.prepare_graph(length, batch, exchange.plan, pending, place)
        else:
            forward = runner.prepare(batch, exchange, pending, place)
        start, waited = perf_counter(), coordinator.collective.waited_s
        output = forward()
        plan = exchange.plan
        self.traces.append(
            SlotTrace(
                slot=slot,
                real_rows=plan.real_rows,
                gathered_rows=plan.gathered_rows,
                wire_rows=plan.wire_rows * 2 * runner.model.num_moe_layers,
                forward_s=perf_counter() - start,
                wait_s=coordinator.collective.waited_s - waited,
            )
        )
        self.prepare_s += start - at_prepare
        return output
