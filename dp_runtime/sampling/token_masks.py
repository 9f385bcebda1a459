"""Masks of the tokens that a request may choose: a bit for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import Bool
from dp_runtime.core.device_copy import on_device
from dp_runtime.core.request import RankRequest
from dp_runtime.sampling.filters import Array, change_rows


@dataclass(frozen=True, eq=False)
class GrammarMasks:
    """What grammars allow at the sampled rows of a step; all else may have any token."""

    allowed: Mapping[int, Array]  # by row: [vocab / 8] uint8
    causes: Mapping[int, str]  # by row: why its grammar allows nothing

    def joined(self, masks: Sequence[Array | None]) -> list[Array | None]:
        """Take from each row's mask what its grammar forbids."""
        return [
            mask if own is None else own if mask is None else own & mask
            for mask, own in zip(masks, map(self.allowed.get, range(len(masks))))
        ]


NO_GRAMMARS = GrammarMasks({}, {})


def token_mask(request: RankRequest, vocab_size: int) -> Array | None:
    """Pack the tokens that a request may choose at all; None: every token."""
    allowed = request.params.allowed_token_ids
    bad = [word[0] for word in request.bad_words if len(word) == 1]
    if allowed is None and not bad:
        return None
    chosen: Bool = np.full(vocab_size, allowed is None)
    chosen[list(allowed or ())] = True
    chosen[bad] = False
    return np.packbits(chosen, bitorder="little")


def mask_rows(logits: Tensor, masks: Sequence[Array | None]) -> Tensor:
    """Keep the logits [n, vocab] of tokens whose bit is set in their row's mask [vocab / 8]."""
    rows = np.array([row for row, mask in enumerate(masks) if mask is not None], np.int64)
    if not len(rows):
        return logits
    packed = on_device(np.stack([mask for mask in masks if mask is not None]), logits.device)
    bits = torch.arange(8, dtype=torch.uint8, device=logits.device)
    allowed = (packed[..., None] >> bits & 1).bool().flatten(1)[:, : logits.shape[1]]
    return change_rows(logits, rows, lambda picked: picked.masked_fill(~allowed, -torch.inf))
