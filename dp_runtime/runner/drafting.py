"""Drafting: a draft model's chains of tokens, and what each request's next chain begins with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import Int64, LocalBatch
from dp_runtime.core.device_copy import all_on_device
from dp_runtime.core.request import RankRequest
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs.pass_graphs import PassOutput
from dp_runtime.sampling.draft_verification import ForcedAcceptance, LastAccepted, Verification
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from dp_runtime.speculative.draft import DraftModel


@dataclass(frozen=True, eq=False)
class DraftChains:
    """The last tokens of a step's decodes, their drafts so far, and what drafts next."""

    tokens: tuple[Tensor, ...]  # the last token, then each draft: [requests] int64
    hidden: Tensor  # [requests, hidden], which the draft model gave with the last of them
    num_rejected: Tensor | None  # [requests] int64: bounds minus true lengths; None: no bounds

    @property
    def next_inputs(self) -> FutureTokens:
        return FutureTokens(self.tokens[-1], self.hidden, self.num_rejected)

    @property
    def drafts(self) -> Tensor:
        return torch.stack(self.tokens[1:], 1)

    @property
    def rows(self) -> Tensor:
        """Return what the target reads to verify them, [requests * (1 + drafts)] int64."""
        return torch.stack(self.tokens, 1).flatten()


class DraftState:
    """Holds what each request's next chain begins with, on the device; a PerRequestState.

    The draft_extend pass writes it, of every prefill chunk too: `add` has nothing to prepare.
    """

    def __init__(self, model: DraftModel, num_table_rows: int, device: torch.device) -> None:
        self._numbers = torch.zeros(3, num_table_rows, dtype=torch.int64, device=device)
        self.last_token, self.first_draft, self.num_rejected = self._numbers
        self.hidden = torch.zeros(
            num_table_rows, model.hidden_size, dtype=model.dtype, device=device
        )
        self._written = np.zeros(num_table_rows, np.bool_)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        assert not self._written[req_index], f"row {req_index} has the draft state of another"

    def remove(self, req_index: int) -> None:
        self._written[req_index] = False

    def check(self, req_indices: Sequence[int]) -> None:
        others = sorted({*self._written.nonzero()[0].tolist()} - {*req_indices})
        assert not others, f"draft state of rows {others}, which nobody has"

    def read(self, req_indices: Int64, are_bounds: np.ndarray) -> DraftChains:
        """Begin chains of one draft; are_bounds: whose last verification is in flight."""
        assert self._written[req_indices].all(), "a request decodes that drafted nothing yet"
        rows, mask = all_on_device([req_indices, are_bounds.astype(np.int64)], self.device)
        last_token, first_draft, num_rejected = self._numbers[:, rows]
        bounds = num_rejected * mask if are_bounds.any() else None
        return DraftChains((last_token, first_draft), self.hidden[rows], bounds)

    def write(
        self,
        req_indices: Int64,
        rows: Tensor,
        last: LastAccepted,
        first_draft: Tensor,
        hidden: Tensor,
    ) -> None:
        """rows: req_indices on the device; first_draft [requests], hidden [requests, hidden]."""
        self._written[req_indices] = True
        self._numbers[:, rows] = torch.stack((last.token_ids, first_draft, last.num_rejected))
        self.hidden[rows] = hidden


class Drafting:
    def __init__(
        self, model: DraftModel, forced: ForcedAcceptance | None, state: DraftState
    ) -> None:
        self.model = model
        self.state = state
        self._forced = forced

    def begin(self, decodes: Int64, target: LocalBatch) -> DraftChains:
        """Begin chains of one draft each."""
        return self.state.read(decodes, target.lengths_are_bounds[: len(decodes)])

    def extend(self, chains: DraftChains, output: PassOutput) -> DraftChains:
        """Append a draft pass's token to each chain."""
        last, hidden = output.hidden
        logits = output.logits
        if logits is None:
            logits = RowLogits.from_logits(self.model.logits(last))
        tokens = self.model.token_ids(logits.best).clone()  # a graph's output is written again
        return replace(chains, tokens=(*chains.tokens, tokens), hidden=hidden)

    def verification(self, chains: DraftChains) -> Verification:
        return Verification(chains.drafts, self._forced)

    def extend_inputs(
        self, target: PassOutput, token_ids: Tensor, chains: DraftChains
    ) -> FutureTokens:
        hidden = self.model.project(target.hidden.aux_hidden_states)
        return FutureTokens(token_ids, hidden, chains.num_rejected)

    def keep(
        self, scheduled: SchedulerOutput, batch: LocalBatch, sampled: Sampled, output: PassOutput
    ) -> None:
        """Keep what each request's next step needs; docs/architecture.md draws its indices."""
        first_rows = batch.sample_rows
        max_accepted = np.zeros(len(first_rows), np.int64)
        max_accepted[: len(scheduled.decodes)] = scheduled.num_drafts
        samples_host = batch.future_token_index[first_rows]
        arrays = (
            scheduled.req_indices, first_rows, samples_host, batch.token_ids[first_rows],
            max_accepted,
        )  # fmt: skip
        rows, first, samples, known, bounds = all_on_device(arrays, self.state.device)
        assert sampled.num_accepted is not None, "a step that drafts verifies"
        accepted = LastAccepted.after_verification(
            first_rows=first, first_samples=samples, max_accepted=bounds,
            known_tokens=known if (samples_host < 0).any() else None,
            sampled_tokens=sampled.token_ids, num_accepted=sampled.num_accepted,
        )  # fmt: skip
        last, hidden = output.hidden
        best = RowLogits.from_logits(self.model.logits(last[accepted.rows])).best
        first_draft = self.model.token_ids(best)
        self.state.write(scheduled.req_indices, rows, accepted, first_draft, hidden[accepted.rows])
