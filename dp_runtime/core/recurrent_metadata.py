"""RecurrentMetadata: the inputs of a recurrent layer's kernels, built from a LocalBatch alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import Place
from dp_runtime.core.batch import NULL_SLOT, Int32, Int64, LocalBatch, StateSlots
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


class AcceptedDrafts:
    """How many drafts of each slot's last pass were accepted, which only the device knows.

    Every pass that writes a state is followed by a `write`, of 0 where nothing was drafted. Nobody
    reads what a slot's last owner left, for the next is fresh.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._counts = torch.zeros(num_slots, dtype=torch.int32, device=device)

    def of(self, slots: Tensor) -> Tensor:
        return self._counts[slots]

    def read(self, slots: Tensor, out: Tensor) -> None:
        torch.index_select(self._counts, 0, slots, out=out)

    def write(self, slots: Tensor, num_accepted: Tensor | None) -> None:
        """num_accepted: of the first of these slots; the others have drafted nothing."""
        self._counts.index_fill_(0, slots, 0)  # counts[slots] = 0 would wait for a copy of the 0
        if num_accepted is not None:
            self._counts[slots[: len(num_accepted)]] = num_accepted.to(self._counts.dtype)


@dataclass(frozen=True, eq=False)
class Tracks:
    """Slots that chunked sequences leave their state in on the way, for a prefix cache.

    They stand at the end of a chunk of CHUNK rows, where the kernels have the state anyway.
    """

    slots: Tensor  # [requests] int64, NULL_SLOT: the request leaves none
    rows: Tensor  # [requests] int32, of its rows in this pass, those before that state
    rows_host: Int32


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


class RecurrentLayer(Protocol):
    """A layer whose rows see others of their sequence between two products."""

    def project(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Project x [rows, hidden] -> `out`, by default a new tensor."""

    def mix(
        self, projected: Tensor, sequences: RecurrentMetadata, out: Tensor | None = None
    ) -> Tensor:
        """Mix rows with those before them -> `out`, by default a new tensor."""


class RecurrentPlan(Protocol):
    """How the recurrent layers of a pass run, the same in each of them."""

    def run(self, layer: RecurrentLayer, x: Tensor) -> Tensor:
        """Project and mix x [rows, hidden]."""


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
    tracks: Tracks | None = None  # None: nobody can leave a state on the way

    @property
    def batch_size(self) -> int:
        return self.slots.shape[0]

    def run(self, layer: RecurrentLayer, x: Tensor) -> Tensor:
        return layer.mix(layer.project(x), self)

    @cached_property
    def row_blocks(self) -> RowBlocks:
        return RowBlocks.of(self.query_lens_host, self.slots.device)

    @classmethod
    def build(
        cls,
        batch: LocalBatch,
        num_slots: int,
        place: Place,
        device: torch.device,
        accepted: AcceptedDrafts | None = None,
    ) -> RecurrentMetadata:
        """Check the batch's values once on the host and copy them to the device.

        accepted: of passes before; None for slots without room for drafts.
        """
        check_sequences(batch, num_slots, accepted, place)
        states = batch.states
        of_batch = states.num_drafts if len(states.num_drafts) else np.zeros_like(batch.query_lens)
        cu_seqlens = np.zeros(batch.num_requests + 1, np.int32)
        np.cumsum(batch.query_lens, out=cu_seqlens[1:])
        arrays = cu_seqlens, states.slots, states.is_fresh, of_batch
        lens, slots, is_fresh, num_drafts = all_on_device(arrays, device)
        drafts = None if accepted is None else Drafts(num_drafts, accepted.of(slots))
        tracks = _tracks(states, device) if len(states.track_slots) else None
        return cls(lens, batch.query_lens, slots, is_fresh, drafts, tracks)


def _tracks(states: StateSlots, device: torch.device) -> Tracks:
    slots, rows = all_on_device((states.track_slots, states.track_rows), device)
    return Tracks(slots, rows, states.track_rows)


def check_tracks(batch: LocalBatch, num_slots: int, place: Place) -> None:
    """Raise ContractViolation for a track slot that is another's, or a place between chunks."""
    slots, rows = batch.states.track_slots, batch.states.track_rows
    if not len(slots):
        return
    at = np.flatnonzero(slots != NULL_SLOT)
    taken = np.concatenate((batch.states.slots, slots[at]))
    if len(taken) != len(np.unique(taken)) or taken.min() < NULL_SLOT or taken.max() >= num_slots:
        raise ContractViolation(
            f"{place}: track_slots are {slots[at].tolist()} beside state_slots "
            f"{batch.states.slots.tolist()}, allowed: each once, below {num_slots}"
        )
    inside = (rows > 0) & (rows < batch.query_lens) & (rows % CHUNK == 0)
    wrong = np.flatnonzero(np.where(slots != NULL_SLOT, ~inside, rows != 0))
    if len(wrong):
        index = int(wrong[0])
        raise ContractViolation(
            f"{place}: track_rows[{index}] is {rows[index]} of {batch.query_lens[index]}, allowed: "
            f"a multiple of {CHUNK} below that, or 0 without a slot"
        )


def check_sequences(
    batch: LocalBatch, num_slots: int, accepted: AcceptedDrafts | None, place: Place
) -> None:
    check_state_slots(batch, num_slots, place)
    check_drafts(batch, 0 if accepted is None else MAX_STEPPED - 1, place)
    check_tracks(batch, num_slots, place)


def check_drafts(batch: LocalBatch, most: int, place: Place) -> None:
    """Raise ContractViolation for drafts that a slot has no room for, or that leave no token."""
    num_drafts = batch.states.num_drafts
    if not len(num_drafts):
        return
    allowed = np.minimum(batch.query_lens - 1, most)
    wrong = np.flatnonzero((num_drafts < 0) | (num_drafts > allowed))
    if len(wrong):
        index = int(wrong[0])
        raise ContractViolation(
            f"{place}: num_drafts[{index}] is {num_drafts[index]}, allowed: 0..{allowed[index]}"
        )


def check_state_slots(batch: LocalBatch, num_slots: int, place: Place) -> None:
    """Raise ContractViolation for what would have a kernel read or write another's state."""
    slots, count = batch.states.slots, batch.num_requests
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
    starts, is_fresh = batch.seq_lens - batch.query_lens, batch.states.is_fresh
    wrong = np.flatnonzero(is_fresh != (starts == 0))
    if len(wrong):
        index = int(wrong[0])
        raise ContractViolation(
            f"{place}: is_fresh[{index}] is {bool(is_fresh[index])} at position "
            f"{starts[index]}, allowed: a request is fresh at position 0 and only there"
        )
