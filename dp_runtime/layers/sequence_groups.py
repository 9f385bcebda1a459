"""Sequences of a pass that a recurrent layer runs together in torch, as they are alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import Int32
from dp_runtime.core.recurrent_metadata import RecurrentMetadata

REQUESTS_AT_ONCE = 8  # whose states are copied; bounds what a pass of many decodes needs


@dataclass(frozen=True, eq=False)
class SequenceGroup:
    """Some requests of a pass that have equally many rows, of which equally many are drafts."""

    length: int
    num_drafts: int  # the last of each request's rows, which may be rejected
    num_accepted: int  # rows of the pass before, which are run once more ahead of these
    num_tracked: int  # rows before the state that is left in a track slot; 0: none is
    rows: Tensor  # [requests * length]
    slots: Tensor  # [requests] int64
    track_slots: Tensor  # [requests] int64
    is_fresh: Tensor  # [requests] bool

    def start_from(self, state: Tensor) -> Tensor:
        """Read the states [requests, ...]; a fresh request's is zero, whatever its slot holds."""
        own = state[self.slots]
        fresh = self.is_fresh.view(-1, *[1] * (own.dim() - 1))
        return own.masked_fill(fresh, 0)


def group_sequences(sequences: RecurrentMetadata) -> Iterator[SequenceGroup]:
    lengths, device = sequences.query_lens_host, sequences.slots.device
    starts = lengths.cumsum() - lengths
    tracks, none = sequences.tracks, np.zeros_like(lengths)
    tracked = none if tracks is None else tracks.rows_host
    track_slots = sequences.slots if tracks is None else tracks.slots
    kinds = np.stack((lengths, *_drafts_on_host(sequences), tracked), 1)
    for kind in np.unique(kinds[lengths > 0], axis=0):
        equal = np.flatnonzero((kinds == kind).all(1))
        length, num_drafts, num_accepted, num_tracked = kind.tolist()
        for first in range(0, len(equal), REQUESTS_AT_ONCE):
            members = equal[first : first + REQUESTS_AT_ONCE]
            rows = (starts[members, None] + np.arange(length)).ravel()
            index, row_index = (torch.from_numpy(x).to(device) for x in (members, rows))
            yield SequenceGroup(
                length, num_drafts, num_accepted, num_tracked, row_index,
                sequences.slots[index], track_slots[index], sequences.is_fresh[index],
            )  # fmt: skip


def _drafts_on_host(sequences: RecurrentMetadata) -> tuple[Int32, Int32]:
    """Return each request's drafts, and those of the pass before that were accepted."""
    drafts = sequences.drafts
    if drafts is None:
        none = np.zeros_like(sequences.query_lens_host)
        return none, none
    accepted = drafts.num_accepted.masked_fill(sequences.is_fresh, 0)
    return drafts.num_drafts.cpu().numpy(), accepted.cpu().numpy()
