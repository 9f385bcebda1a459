"""Drafting: a draft model, and what it keeps on the device between slots and between steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.batch import Int64, LocalBatch
from dp_runtime.graphs import SlotOutput
from dp_runtime.pending import Pending
from dp_runtime.row_logits import RowLogits
from dp_runtime.sampling import Sampled
from dp_runtime.scheduled import Scheduled
from dp_runtime.speculative.draft import DraftModel
from dp_runtime.speculative.verify import Forced, Verification
from dp_runtime.transfer import all_on_device


@dataclass(frozen=True, eq=False)
class DraftChains:
    """The tokens drafted so far for the decoding requests of a step, and what drafts the next."""

    tokens: tuple[Tensor, ...]  # of each draft [requests] int64
    hidden: Tensor  # [requests, hidden], which the draft model gave with the last of them

    @property
    def pending(self) -> Pending:
        """What the next draft slot reads."""
        return Pending(self.tokens[-1], self.hidden)

    @property
    def table(self) -> Tensor:
        """[requests, drafts] int64."""
        return torch.stack(self.tokens, 1)


class Drafting:
    """Begins each step's chains, extends them, and keeps what the next step's begin with.

    The first draft of a request's next step, and the hidden state it came with, lie by the
    request's row of the request table, num_rows in all. A request has them once any of its rows
    went through a draft_extend slot, as those of every prefill chunk and every verification do.
    """

    def __init__(
        self, model: DraftModel, forced: Forced | None, num_rows: int, device: torch.device
    ) -> None:
        self.model = model
        self._forced = forced
        self._tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._hidden = torch.zeros(num_rows, model.hidden_size, dtype=model.dtype, device=device)

    def begin(self, decodes: Int64) -> DraftChains:
        """Chains of one token, of the requests in these rows of the table."""
        (rows,) = all_on_device([decodes], self._tokens.device)
        return DraftChains((self._tokens[rows],), self._hidden[rows])

    def extend(self, chains: DraftChains, output: SlotOutput) -> DraftChains:
        """One more token of each, from a draft slot."""
        last, hidden = output.hidden
        logits = output.logits
        if logits is None:
            logits = RowLogits.of(self.model.logits(last))
        tokens = self.model.token_ids(logits.best).clone()  # a graph's output is written again
        return DraftChains((*chains.tokens, tokens), hidden)

    def verification(self, chains: DraftChains) -> Verification:
        """What the sampler is to verify."""
        return Verification(chains.table, self._forced)

    def features(self, target: SlotOutput, token_ids: Tensor) -> Pending:
        """What the draft_extend slot reads: the target's rows, and the tokens it chose."""
        return Pending(token_ids, self.model.project(target.hidden.features))

    def keep(
        self, scheduled: Scheduled, batch: LocalBatch, sampled: Sampled, output: SlotOutput
    ) -> None:
        """Keep the first draft of every request of a draft_extend slot, for its next step.

        batch: of that slot; its sample_rows are each request's first, and the last accepted row of
        a verification lies so far behind as drafts were accepted.
        """
        arrays = (scheduled.rows, batch.sample_rows)
        table_rows, rows = all_on_device(arrays, self._tokens.device)
        assert sampled.num_accepted is not None, "a step that drafts verifies"
        rows[: len(sampled.num_accepted)] += sampled.num_accepted
        last, hidden = output.hidden
        best = RowLogits.of(self.model.logits(last[rows])).best
        self._tokens[table_rows] = self.model.token_ids(best)
        self._hidden[table_rows] = hidden[rows]
