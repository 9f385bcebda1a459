"""LocalBatch: the real rows of one rank in one pass. It knows nothing of other ranks.

SamplePositions: the output tokens that its sampled rows become.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

NULL_PAGE = 0
NULL_SLOT = 0  # of recurrent states


def slots_of(page_table: Int32, owner: Int64, positions: Int64, page_size: int) -> Int64:
    """Compute the slot of each row [rows], whose request is owner [rows]."""
    pages = page_table[owner, positions // page_size].astype(np.int64)
    slots: Int64 = pages * page_size + positions % page_size
    return slots


def _freeze(*arrays: NDArray[Any]) -> None:
    for array in arrays:
        array.setflags(write=False)


def _none(dtype: type[np.generic], *shape: int) -> Any:
    """Make an empty array that all batches share."""
    none = np.zeros(shape, dtype)
    none.setflags(write=False)
    return none


NO_IDS: Int64 = _none(np.int64, 0)
NO_COUNTS: Int32 = _none(np.int32, 0)
ALL_EXACT: Bool = _none(np.bool_, 0)
AS_POSITIONS: Int64 = _none(np.int64, 3, 0)


@dataclass(frozen=True, eq=False)
class RowValues:
    """What some rows of a pass bring with them, in read-only arrays."""

    rows: Int64  # [n]
    values: NDArray[Any]  # [n, ...]

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.values), "one value per row"
        _freeze(self.rows, self.values)

    def __len__(self) -> int:
        return len(self.rows)


NO_EMBEDS = RowValues(NO_IDS, np.zeros((0, 0), np.float32))
NO_IMAGES = RowValues(NO_IDS, NO_IDS)
NO_REPLAYS = RowValues(NO_IDS, np.zeros((0, 0, 0), np.int16))


@dataclass(frozen=True, eq=False)
class StateSlots:
    """Where the recurrent states of a pass's requests lie, in read-only arrays."""

    slots: Int64  # [requests]
    is_fresh: Bool  # [requests] the request has no state yet
    num_drafts: Int32 = field(default_factory=lambda: NO_COUNTS)  # [requests] last rows; empty: 0
    track_slots: Int64 = field(default_factory=lambda: NO_IDS)  # [requests]; empty: nobody's
    track_rows: Int32 = field(default_factory=lambda: NO_COUNTS)  # before the tracked state

    def __post_init__(self) -> None:
        requests = len(self.slots)
        assert len(self.is_fresh) == requests, "is_fresh has one entry per state slot"
        assert len(self.num_drafts) in (0, requests), "one number of drafts per request, or none"
        assert len(self.track_slots) in (0, requests), "one track slot per request, or none"
        assert len(self.track_rows) == len(self.track_slots), "one number of rows per track slot"
        _freeze(*vars(self).values())

    def __len__(self) -> int:
        return len(self.slots)


NO_STATES = StateSlots(NO_IDS, ALL_EXACT)


@dataclass(frozen=True, eq=False)
class LocalBatch:
    """A rank's rows for one pass, request after request, in read-only arrays.

    While a verification is in flight, the host knows only upper bounds of its requests' lengths,
    positions and slots. The true ones are `num_rejected` lower, which only the device knows.
    """

    token_ids: Int64  # [rows]
    future_token_index: Int64  # [rows] index into FutureTokens.token_ids; -1: token_ids holds it
    positions: Int64  # [rows]
    slot_mapping: Int64  # [rows] page * page_size + offset
    query_lens: Int32  # [requests]
    seq_lens: Int32  # [requests] tokens in the cache after this step
    page_table: Int32  # [requests, pages], rows end in the null page
    sample_rows: Int64  # [samples] rows whose logits are needed
    lengths_are_bounds: Bool = field(default_factory=lambda: ALL_EXACT)  # [requests], or empty
    rope_positions: Int64 = field(default_factory=lambda: AS_POSITIONS)  # [3, rows], or [3, 0]
    states: StateSlots = NO_STATES  # of all requests, or of none
    embeds: RowValues = NO_EMBEDS  # values: [embeds, hidden] float32
    images: RowValues = NO_IMAGES  # values: [image tokens] int64, slots of their features
    replays: RowValues = NO_REPLAYS  # values: [replays, MoE layers, top_k] int16; -1: free

    def __post_init__(self) -> None:
        rows, requests = self.num_tokens, self.num_requests
        for name in ("future_token_index", "positions", "slot_mapping"):
            assert getattr(self, name).shape == (rows,), f"{name} has one entry per row"
        assert self.seq_lens.shape == (requests,), "seq_lens has one entry per request"
        assert self.page_table.shape[0] == requests, "page_table has one row per request"
        assert np.add.reduce(self.query_lens) == rows, "query_lens sum to the rows"
        assert len(self.lengths_are_bounds) in (0, requests), "one entry per request, or none"
        assert self.rope_positions.shape in ((3, 0), (3, rows)), "three positions of all rows"
        assert len(self.states) in (0, requests), "one state slot per request, or none"
        _freeze(
            self.token_ids, self.future_token_index, self.positions, self.slot_mapping,
            self.query_lens, self.seq_lens, self.page_table, self.sample_rows,
            self.lengths_are_bounds, self.rope_positions,
        )  # fmt: skip

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    @property
    def rotary_positions(self) -> Int64:
        """Positions by which rows are rotated: [rows], or [3, rows] where requests have images."""
        return self.rope_positions if self.rope_positions.shape[1] else self.positions

    @property
    def has_embeds(self) -> bool:
        return bool(len(self.embeds) or len(self.images))

    def rewound(self, num_rejected: Int64, page_size: int) -> LocalBatch:
        """Move each request's rows back to their true positions, num_rejected [requests] lower."""
        owner = np.arange(self.num_requests).repeat(self.query_lens)
        lower = num_rejected[owner]
        positions, rope = self.positions - lower, self.rope_positions
        return replace(
            self,
            positions=positions,
            rope_positions=rope - lower if rope.shape[1] else rope,
            slot_mapping=slots_of(self.page_table, owner, positions, page_size),
            seq_lens=(self.seq_lens - num_rejected).astype(np.int32),
            lengths_are_bounds=ALL_EXACT,
        )

    @classmethod
    def empty(cls) -> LocalBatch:
        return cls(
            token_ids=NO_IDS,
            future_token_index=NO_IDS,
            positions=NO_IDS,
            slot_mapping=NO_IDS,
            query_lens=NO_COUNTS,
            seq_lens=NO_COUNTS,
            page_table=np.zeros((0, 0), np.int32),
            sample_rows=NO_IDS,
        )


@dataclass(frozen=True, eq=False)
class SamplePositions:
    req_indices: Int64  # [n] rows of the request table
    output_indices: Int64  # [n] which output token of its request this is, from 0

    def __len__(self) -> int:
        return len(self.req_indices)

    def __getitem__(self, rows: slice) -> SamplePositions:
        return SamplePositions(self.req_indices[rows], self.output_indices[rows])
