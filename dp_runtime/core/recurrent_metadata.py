"""RecurrentMetadata: the inputs of a recurrent layer's kernels, built from a LocalBatch alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import Place
from dp_runtime.core.batch import NULL_SLOT, Int32, Int64, LocalBatch
from dp_runtime.core.device_copy import all_on_device
from dp_runtime.errors import ContractViolation

CHUNK = 64  # rows that are run at once, counted from a sequence's first row in the pass
MAX_STEPPED = 8  # a sequence of no more rows is run row by row: decodes, verifications


@dataclass(frozen=True, eq=False)
class Drafts:
    """Rows that may be rejected: the last of a sequence, in this pass and in the pass before.

    A slot holds the state before its drafts, and their inputs. The next pass runs those that were
    accepted once more, from the same inputs to the same bits: one state is read and one written,
    however many drafts there are. Only sequences that are run row by row draft, or have drafted.
    """

    num_drafts: Tensor  # [requests] int32, of this pass's rows; at least one row is none
    num_accepted: Tensor  # [requests] int32, drafts of the pass before; not read of fresh requests


@dataclass(frozen=True, eq=False)
class RowBlocks:
    """Tables of who runs which rows, for kernels that take sequences of very unlike lengths."""

    blocks: Tensor  # [blocks, 2] int32: request, and its block's number; the chunks come first
    chunked: Tensor  # [sequences, 2] int32: request, and its first of all chunks
    stepped: Tensor  # [sequences] int32: request
    num_chunks: int  # of all sequences that are run in chunks

    @classmethod
    def of(cls, query_lens: Int32, device: torch.device) -> RowBlocks:
        lengths = query_lens.astype(np.int64)
        long = np.flatnonzero(lengths > MAX_STEPPED)
        short = np.flatnonzero((lengths > 0) & (lengths <= MAX_STEPPED))
        counts = -(-lengths[long] // CHUNK)
        first = counts.cumsum() - counts
        owner = long.repeat(counts)
        number = np.arange(len(owner)) - first.repeat(counts)
        blocks = np.concatenate((_pairs(owner, number), _pairs(short, np.zeros_like(short))))
        assert len(blocks) < 2**16, "a launch has no more programs in its second dimension"
        tables = blocks, _pairs(long, first), short.astype(np.int32)
        there, chunked, stepped = all_on_device(tables, device)
        return cls(there, chunked, stepped, len(owner))


def _pairs(requests: Int64, numbers: Int64) -> Int32:
    return np.stack((requests, numbers), 1).astype(np.int32)


@dataclass(frozen=True, eq=False)
class RecurrentMetadata:
    """The sequences of one pass on one rank, and where the state of each of them lies.

    A fresh request begins with a state of zeros; what its slot holds is another's, or nobody's.
    """

    cu_seqlens: Tensor  # [requests + 1] int32
    query_lens_host: Int32  # [requests]
    slots: Tensor  # [requests] int64, none of them twice
    is_fresh: Tensor  # [requests] bool
    drafts: Drafts | None = None

    @property
    def batch_size(self) -> int:
        return self.slots.shape[0]

    @cached_property
    def row_blocks(self) -> RowBlocks:
        return RowBlocks.of(self.query_lens_host, self.slots.device)

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
