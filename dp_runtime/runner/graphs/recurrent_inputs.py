"""RecurrentInputs: what captured graphs read about the states of a pass's sequences."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.batch import NULL_SLOT, Int32, LocalBatch
from dp_runtime.core.recurrent_metadata import AcceptedDrafts, Drafts, RecurrentMetadata


class RecurrentInputs:
    """Views of a graph's int32 words, in the dtypes that kernels read in eager passes too.

    A null sequence has the null slot, which kernels neither read nor write.
    """

    def __init__(self, words: Mapping[str, Tensor], accepted: AcceptedDrafts | None) -> None:
        self.slots = words["state_slots"].view(torch.int64)
        self.is_fresh = words["is_fresh"].view(torch.bool)
        self.num_drafts = words["num_drafts"]
        self._num_accepted = torch.zeros_like(self.num_drafts)
        self._accepted = accepted  # None for slots without room for drafts

    @staticmethod
    def shapes(max_requests: int) -> dict[str, tuple[int, ...]]:
        """Return the fields' sizes in words."""
        return {
            "state_slots": (2 * max_requests,),
            "is_fresh": (-(-max_requests // 4),),
            "num_drafts": (max_requests,),
        }

    @staticmethod
    def write(into: Mapping[str, Int32], batch: LocalBatch) -> None:
        requests, states = batch.num_requests, batch.states
        into["state_slots"].view(np.int64)[:requests] = states.slots
        into["is_fresh"].view(np.bool_)[:requests] = states.is_fresh
        into["num_drafts"][:requests] = states.num_drafts if len(states.num_drafts) else 0

    @staticmethod
    def write_null(into: Mapping[str, Int32], start: int, stop: int) -> None:
        into["state_slots"].view(np.int64)[start:stop] = NULL_SLOT
        into["is_fresh"].view(np.bool_)[start:stop] = False
        into["num_drafts"][start:stop] = 0

    def sequences(self, cu_seqlens: Tensor, query_len: int) -> RecurrentMetadata:
        """Make metadata over these inputs for sequences of equal lengths."""
        requests = len(cu_seqlens) - 1
        drafts = None
        if self._accepted is not None:
            drafts = Drafts(self.num_drafts[:requests], self._num_accepted[:requests])
        lengths = np.full(requests, query_len, np.int32)
        slots, is_fresh = self.slots[:requests], self.is_fresh[:requests]
        return RecurrentMetadata(cu_seqlens, lengths, slots, is_fresh, drafts)

    def read_accepted(self, requests: int) -> None:
        """Look up which drafts were accepted since; the first work of a graph."""
        if self._accepted is not None:
            self._accepted.read(self.slots[:requests], self._num_accepted[:requests])
