"""LocalBatch: the real rows of one rank in one pass. It knows nothing of other ranks.

SamplePositions: the output tokens that its sampled rows become.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Int16 = NDArray[np.int16]
Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Bool = NDArray[np.bool_]

NULL_PAGE = 0
NULL_SLOT = 0  # of recurrent states


def _empty_ids() -> Int64:
    return np.zeros(0, np.int64)


def _no_counts() -> Int32:
    return np.zeros(0, np.int32)


def _none_of() -> Bool:
    return np.zeros(0, np.bool_)


def _no_embeds() -> Float32:
    return np.zeros((0, 0), np.float32)


def _as_positions() -> Int64:
    return np.zeros((3, 0), np.int64)


def _no_replays() -> Int16:
    return np.zeros((0, 0, 0), np.int16)


def slots_of(page_table: Int32, owner: Int64, positions: Int64, page_size: int) -> Int64:
    """Compute the slot of each row [rows], whose request is owner [rows]."""
    pages = page_table[owner, positions // page_size].astype(np.int64)
    slots: Int64 = pages * page_size + positions % page_size
    return slots


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
    lengths_are_bounds: Bool = field(default_factory=_none_of)  # [requests]; empty: all exact
    state_slots: Int64 = field(default_factory=_empty_ids)  # [requests]; empty: no recurrent state
    is_fresh: Bool = field(default_factory=_none_of)  # likewise; the request has no state yet
    num_drafts: Int32 = field(default_factory=_no_counts)  # [requests] last rows; empty: 0
    track_slots: Int64 = field(default_factory=_empty_ids)  # [requests]; empty: nobody's is tracked
    track_rows: Int32 = field(default_factory=_no_counts)  # likewise; rows before the tracked state
    embed_rows: Int64 = field(default_factory=_empty_ids)  # [embeds]
    embeds: Float32 = field(default_factory=_no_embeds)  # [embeds, hidden]
    image_rows: Int64 = field(default_factory=_empty_ids)  # [image tokens]
    image_slots: Int64 = field(default_factory=_empty_ids)  # [image tokens] of their features
    rope_positions: Int64 = field(default_factory=_as_positions)  # [3, rows]; [3, 0]: `positions`
    replay_rows: Int64 = field(default_factory=_empty_ids)  # [replays]
    replays: Int16 = field(default_factory=_no_replays)  # [replays, MoE layers, top_k]; -1: free

    def __post_init__(self) -> None:
        rows, requests = self.num_tokens, self.num_requests
        for name in ("future_token_index", "positions", "slot_mapping"):
            assert getattr(self, name).shape == (rows,), f"{name} has one entry per row"
        assert self.seq_lens.shape == (requests,), "seq_lens has one entry per request"
        assert self.page_table.shape[0] == requests, "page_table has one row per request"
        assert np.add.reduce(self.query_lens) == rows, "query_lens sum to the rows"
        assert len(self.lengths_are_bounds) in (0, requests), "one entry per request, or none"
        assert len(self.state_slots) in (0, requests), "one state slot per request, or none"
        assert len(self.is_fresh) == len(self.state_slots), "is_fresh has one entry per state slot"
        assert len(self.num_drafts) in (0, requests), "one number of drafts per request, or none"
        assert len(self.track_slots) in (0, requests), "one track slot per request, or none"
        assert len(self.track_rows) == len(self.track_slots), "one number of rows per track slot"
        assert len(self.embed_rows) == len(self.embeds), "one embedding per embed row"
        assert len(self.image_rows) == len(self.image_slots), "one feature per row of an image"
        assert self.rope_positions.shape in ((3, 0), (3, rows)), "three positions of all rows"
        assert len(self.replay_rows) == len(self.replays), "experts of each replay row"
        for array in vars(self).values():
            array.setflags(write=False)

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
        return bool(len(self.embed_rows) or len(self.image_rows))

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
            lengths_are_bounds=_none_of(),
        )

    @classmethod
    def empty(cls) -> LocalBatch:
        long, short = np.zeros(0, np.int64), np.zeros(0, np.int32)
        return cls(
            token_ids=long,
            future_token_index=long,
            positions=long,
            slot_mapping=long,
            query_lens=short,
            seq_lens=short,
            page_table=np.zeros((0, 0), np.int32),
            sample_rows=long,
        )


@dataclass(frozen=True, eq=False)
class SamplePositions:
    req_indices: Int64  # [n] rows of the request table
    output_indices: Int64  # [n] which output token of its request this is, from 0

    def __len__(self) -> int:
        return len(self.req_indices)

    def __getitem__(self, rows: slice) -> SamplePositions:
        return SamplePositions(self.req_indices[rows], self.output_indices[rows])
