"""Penalties for tokens that a request has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.device_copy import on_device
from dp_runtime.core.request import RankRequest
from dp_runtime.sampling.draft_verification import Verification
from dp_runtime.sampling.filters import Array, change_rows, penalise


@dataclass(eq=False, kw_only=True)
class Penalties:
    """The tokens that a request has seen, on the device: the host learns them a step later."""

    settings: tuple[float, float, float]  # repetition, frequency, presence
    prompt_ids: Array  # [prompt] int64
    output_ids: Array  # [outputs] int64, those that were there before this state
    in_prompt: Tensor  # [vocab] bool, empty until the request first samples
    output_counts: Tensor  # [vocab] float32, likewise

    @classmethod
    def after_outputs(
        cls, request: RankRequest, outputs: Sequence[int], device: torch.device
    ) -> Penalties:
        params, nothing = request.params, torch.empty(0, device=device)
        return cls(
            settings=(
                params.repetition_penalty, params.frequency_penalty, params.presence_penalty
            ),
            prompt_ids=np.array(request.prompt_token_ids, np.int64),
            output_ids=np.array(outputs, np.int64),
            in_prompt=nothing.bool(),
            output_counts=nothing,
        )  # fmt: skip

    def begin(self, vocab_size: int) -> None:
        """Make the counts when the request first samples."""
        if self.output_counts.numel():
            return
        device = self.output_counts.device
        in_prompt = np.zeros(vocab_size, np.bool_)
        in_prompt[self.prompt_ids] = True
        self.in_prompt = on_device(in_prompt, device)
        if len(self.output_ids):
            counts = np.bincount(self.output_ids, minlength=vocab_size)
            self.output_counts = on_device(counts.astype(np.float32), device)
        else:
            self.output_counts = torch.zeros(vocab_size, dtype=torch.float32, device=device)

    def count(self, token_ids: Tensor, emitted: Tensor) -> None:
        """Count the tokens [n] int64 that became outputs: where emitted [n] float32 is 1, not 0."""
        self.output_counts.index_add_(0, token_ids, emitted)


def penalise_rows(
    logits: Tensor,
    states: Sequence[Penalties | None],
    verification: Verification,
    first_row: int,
) -> Tensor:
    """Penalise rows from first_row on; those of a verification count the drafts they read."""
    rows = np.array([row for row, state in enumerate(states) if state is not None], np.int64)
    if not len(rows):
        return logits
    penalised, device = [state for state in states if state is not None], logits.device
    settings = np.array([state.settings for state in penalised], np.float32)
    in_prompt = torch.stack([state.in_prompt for state in penalised])
    counts = torch.stack([state.output_counts for state in penalised])
    places, sources = verification.assumed(rows + first_row)
    if len(places):
        drafts = verification.drafts.flatten()[on_device(sources, device)]
        one = torch.ones((), dtype=torch.float32, device=device)
        counts.index_put_((on_device(places, device), drafts), one, accumulate=True)
    return change_rows(
        logits,
        rows,
        lambda picked: penalise(picked, in_prompt, counts, on_device(settings, device)),
    )
