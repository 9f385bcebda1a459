"""RecurrentMetadata: the inputs of a recurrent layer's kernels, built from a LocalBatch alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import Place
from dp_runtime.core.batch import NULL_SLOT, Int32, LocalBatch
from dp_runtime.core.device_copy import all_on_device
from dp_runtime.errors import ContractViolation


@dataclass(frozen=True, eq=False)
class RecurrentMetadata:
    """The sequences of one pass on one rank, and where the state of each of them lies.

    A fresh request begins with a state of zeros; what its slot holds is another's, or nobody's.
    """

    cu_seqlens: Tensor  # [requests + 1] int32
    query_lens_host: Int32  # [requests]
    slots: Tensor  # [requests] int64, none of them twice
    is_fresh: Tensor  # [requests] bool

    @property
    def batch_size(self) -> int:
        return self.slots.shape[0]

    @classmethod
    def build(
        cls, batch: LocalBatch, num_slots: int, place: Place, device: torch.device
    ) -> RecurrentMetadata:
        """Check the batch's values once on the host and copy them to the device."""
        check_state_slots(batch, num_slots, place)
        cu_seqlens = np.zeros(batch.num_requests + 1, np.int32)
        np.cumsum(batch.query_lens, out=cu_seqlens[1:])
        arrays = cu_seqlens, batch.state_slots, batch.is_fresh
        lens, slots, is_fresh = all_on_device(arrays, device)
        return cls(lens, batch.query_lens, slots, is_fresh)


def check_state_slots(batch: LocalBatch, num_slots: int, place: Place) -> None:
    """Raise ContractViolation for what would have a kernel read or write another's state."""
    slots, count = batch.state_slots, batch.num_requests
    if len(slots) != count:
        raise ContractViolation(f"{place}: {len(slots)} state slots for {count} requests")
    if not count:
        return
    low, high = int(slots.min()), int(slots.max())
    if low <= NULL_SLOT or high >= num_slots:
        found = low if low <= NULL_SLOT else high
        raise ContractViolation(
            f"{place}: state_slots is {found}, allowed: {NULL_SLOT + 1}..{num_slots - 1}"
        )
    ordered = np.sort(slots)
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ContractViolation(f"{place}: state_slots has {twice[0]} twice, allowed: once")
    starts = batch.seq_lens - batch.query_lens
    wrong = np.flatnonzero(batch.is_fresh != (starts == 0))
    if len(wrong):
        index = int(wrong[0])
        raise ContractViolation(
            f"{place}: is_fresh[{index}] is {bool(batch.is_fresh[index])} at position "
            f"{starts[index]}, allowed: a request is fresh at position 0 and only there"
        )
