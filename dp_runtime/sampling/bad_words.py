"""BadWords: sequences of tokens that a request's output must not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dp_runtime.core.batch import Int64
from dp_runtime.core.device_copy import all_on_device, on_device
from dp_runtime.sampling.draft_verification import Verification

_ANY, _NO_TOKEN = -1, -2


@dataclass(eq=False, kw_only=True)
class BadWords:
    """Words of several tokens, and a request's newest outputs, which only the device knows."""

    prefixes: Int64  # [words, longest] all tokens of a word but the last, after ANY
    last_tokens: Int64  # [words]
    newest: Tensor  # [longest] int64 outputs, after NO_TOKEN

    @classmethod
    def after_outputs(
        cls, words: Sequence[Sequence[int]], outputs: Sequence[int], device: torch.device
    ) -> BadWords:
        longest = max(map(len, words)) - 1
        prefixes = [_at_the_end(word[:-1], longest, _ANY) for word in words]
        newest = _at_the_end(outputs[-longest:], longest, _NO_TOKEN)
        return cls(
            prefixes=np.stack(prefixes),
            last_tokens=np.array([word[-1] for word in words], np.int64),
            newest=on_device(newest, device),
        )

    def append(self, token_ids: Tensor, emitted: Tensor) -> None:
        """Take over the tokens [n] int64 that became outputs: where emitted [n] is 1, not 0."""
        longest = len(self.newest)
        places = torch.arange(longest, device=token_ids.device) + emitted.sum(dtype=torch.int64)
        self.newest = torch.cat([self.newest, token_ids])[places]


def mask_bad_words(
    logits: Tensor,
    states: Sequence[BadWords | None],
    verification: Verification,
    first_row: int,
) -> Tensor:
    """Mask the last token of each word whose others a row, one from first_row on, comes after."""
    rows = np.array([row for row, state in enumerate(states) if state is not None], np.int64)
    if not len(rows):
        return logits
    given = [state for state in states if state is not None]
    before = _tokens_before(given, verification, rows + first_row)
    longest = before.shape[1]
    prefixes = np.concatenate([_widened(state.prefixes, longest) for state in given])
    lasts = np.concatenate([state.last_tokens for state in given])
    owners = np.arange(len(given)).repeat([len(state.last_tokens) for state in given])
    words, last, owner, row = all_on_device((prefixes, lasts, owners, rows[owners]), logits.device)
    found = ((before[owner] == words) | (words == _ANY)).all(1)
    masked = torch.zeros(len(found), device=logits.device).masked_fill_(found, -torch.inf)
    return logits.index_put((row, last), masked, accumulate=True)


def _tokens_before(
    states: Sequence[BadWords], verification: Verification, rows: Int64
) -> Tensor:  # [rows, longest]
    newest = pad_sequence(
        [state.newest for state in states],
        batch_first=True, padding_value=_NO_TOKEN, padding_side="left",
    )  # fmt: skip
    chains, num_read = verification.drafts_read(rows)
    if not num_read.any():
        return newest
    longest = newest.shape[1]
    places = num_read[:, None] + np.arange(longest)
    chain, place = all_on_device((np.where(num_read > 0, chains, 0), places), newest.device)
    return torch.cat([newest, verification.drafts[chain]], 1).gather(1, place)


def _at_the_end(tokens: Sequence[int], length: int, filling: int) -> Int64:
    row = np.full(length, filling, np.int64)
    row[length - len(tokens) :] = tokens
    return row


def _widened(prefixes: Int64, longest: int) -> Int64:
    missing = longest - prefixes.shape[1]
    return np.pad(prefixes, ((0, 0), (missing, 0)), constant_values=_ANY)
