"""Drafting: a draft model, and what it keeps on the device between passes and between steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import Int64, LocalBatch
from dp_runtime.core.transfer import all_on_device
from dp_runtime.runner.future_tokens import FutureTokens
from dp_runtime.runner.graphs import PassOutput
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled
from dp_runtime.sampling.verify import ForcedAcceptance, Verification
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from dp_runtime.speculative.draft import DraftModel


@dataclass(frozen=True, eq=False)
class DraftChains:
    """The last tokens of a step's decoding requests, their drafts so far, and what drafts next."""

    tokens: tuple[Tensor, ...]  # the last token, then each draft: [requests] int64
    hidden: Tensor  # [requests, hidden], which the draft model gave with the last of them
    num_rejected: Tensor | None  # [requests] int64: bounds minus true lengths; None: no bounds

    @property
    def pending(self) -> FutureTokens:
        """What the next draft pass reads."""
        return FutureTokens(self.tokens[-1], self.hidden, self.num_rejected)

    @property
    def drafts(self) -> Tensor:
        """[requests, drafts] int64."""
        return torch.stack(self.tokens[1:], 1)

    @property
    def rows(self) -> Tensor:
        """[requests * (1 + drafts)] int64: what the target reads to verify them."""
        return torch.stack(self.tokens, 1).flatten()


class Drafting:
    """Begins each step's chains, extends them, and keeps what the next step's begin with.

    By each request's row of the request table, num_rows in all, it keeps the request's last token,
    the first draft of its next step, the hidden state that draft came with, and how many tokens
    the last step's verification fell short of its bound. A request has them once any of its rows
    went through a draft_extend pass, as those of every prefill chunk and every verification do.
    """

    def __init__(
        self,
        model: DraftModel,
        forced: ForcedAcceptance | None,
        num_rows: int,
        device: torch.device,
    ) -> None:
        def column() -> Tensor:
            return torch.zeros(num_rows, dtype=torch.int64, device=device)

        self.model = model
        self._forced = forced
        self._last, self._first_draft, self._num_rejected = column(), column(), column()
        self._hidden = torch.zeros(num_rows, model.hidden_size, dtype=model.dtype, device=device)

    def begin(self, decodes: Int64, target: LocalBatch) -> DraftChains:
        """Chains of one draft, of the requests in these rows of the table, the target's first."""
        bounds = target.lengths_are_bounds[: len(decodes)]
        rows, are_bounds = all_on_device([decodes, bounds.astype(np.int64)], self._last.device)
        num_rejected = self._num_rejected[rows] * are_bounds if bounds.any() else None
        tokens = self._last[rows], self._first_draft[rows]
        return DraftChains(tokens, self._hidden[rows], num_rejected)

    def extend(self, chains: DraftChains, output: PassOutput) -> DraftChains:
        """One more token of each, from a draft pass."""
        last, hidden = output.hidden
        logits = output.logits
        if logits is None:
            logits = RowLogits.of(self.model.logits(last))
        tokens = self.model.token_ids(logits.best).clone()  # a graph's output is written again
        return replace(chains, tokens=(*chains.tokens, tokens), hidden=hidden)

    def verification(self, chains: DraftChains) -> Verification:
        """What the sampler is to verify."""
        return Verification(chains.drafts, self._forced)

    def features(self, target: PassOutput, token_ids: Tensor, chains: DraftChains) -> FutureTokens:
        """What the draft_extend pass reads: the target's rows, and the tokens it chose."""
        features = self.model.project(target.hidden.features)
        return FutureTokens(token_ids, features, chains.num_rejected)

    def keep(
        self, scheduled: SchedulerOutput, batch: LocalBatch, sampled: Sampled, output: PassOutput
    ) -> None:
        """Keep what every request of a draft_extend pass needs in its next step.

        batch: of that pass; its sample_rows are each request's first, and the last accepted row of
        a verification lies so far behind as drafts were accepted. That row has read the last token.
        """
        first = batch.sample_rows
        arrays = scheduled.rows, first, batch.future_token_index[first], batch.token_ids[first]
        table_rows, rows, sources, known = all_on_device(arrays, self._last.device)
        accepted = sampled.num_accepted
        assert accepted is not None, "a step that drafts verifies"
        rows[: len(accepted)] += accepted
        sources[: len(accepted)] += accepted
        if len(sampled.token_ids):
            known = torch.where(sources < 0, known, sampled.token_ids[sources.clamp(min=0)])
        num_rejected = torch.zeros_like(rows)
        num_rejected[: len(accepted)] = scheduled.num_drafts - accepted
        last, hidden = output.hidden
        best = RowLogits.of(self.model.logits(last[rows])).best
        self._last[table_rows], self._num_rejected[table_rows] = known, num_rejected
        self._first_draft[table_rows] = self.model.token_ids(best)
        self._hidden[table_rows] = hidden[rows]
