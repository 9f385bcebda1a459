"""LocalBatch: the real rows of one rank in one pass. It knows nothing of other ranks."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

NULL_PAGE = 0


def _empty_ids() -> Int64:
    return np.zeros(0, np.int64)


def _no_embeds() -> Float32:
    return np.zeros((0, 0), np.float32)


def slots_of(page_table: Int32, owner: Int64, positions: Int64, page_size: int) -> Int64:
    """Where in the pool each row goes, [rows]: page * page_size + offset.

    page_table [requests, pages]; owner [rows], each row's request.
    """
    pages = page_table[owner, positions // page_size].astype(np.int64)
    slots: Int64 = pages * page_size + positions % page_size
    return slots


@dataclass(frozen=True, eq=False)
class LocalBatch:
    """This rank's rows for one pass, request after request; its arrays are read-only.

    Sizes are derived from the data they count; there is no padded size here.

    Where a verification was launched and not yet committed, its request's lengths, positions and
    slots are upper bounds: how far behind them it really is lies on the device, in the row of
    the request table that lag_rows names (-1: nowhere, the bounds are exact).
    """

    token_ids: Int64  # [rows]
    future_token_index: (
        Int64  # [rows] index into what only the device knows (Pending); -1: token_ids
    )
    positions: Int64  # [rows]
    slot_mapping: Int64  # [rows] page * page_size + offset
    request_ids: Int64  # [requests]
    query_lens: Int32  # [requests]
    seq_lens: Int32  # [requests] tokens in the cache after this step
    page_table: Int32  # [requests, pages], rows end in the null page
    sample_rows: Int64  # [samples] rows whose logits are needed
    lag_rows: Int64 = field(default_factory=_empty_ids)  # [requests], or empty: all are exact
    embed_rows: Int64 = field(default_factory=_empty_ids)  # [embeds]
    embeds: Float32 = field(default_factory=_no_embeds)  # [embeds, hidden]

    def __post_init__(self) -> None:
        rows, requests = self.num_tokens, self.num_requests
        for name in ("future_token_index", "positions", "slot_mapping"):
            assert getattr(self, name).shape == (rows,), f"{name} has one entry per row"
        for name in ("request_ids", "seq_lens"):
            assert getattr(self, name).shape == (requests,), f"{name} has one entry per request"
        assert self.page_table.shape[0] == requests, "page_table has one row per request"
        assert np.add.reduce(self.query_lens) == rows, "query_lens sum to the rows"
        assert len(self.lag_rows) in (0, requests), "lag_rows has one entry per request, or none"
        assert len(self.embed_rows) == len(self.embeds), "one embedding per embed row"
        for array in vars(self).values():
            array.setflags(write=False)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_requests(self) -> int:
        return len(self.query_lens)

    def behind(self, lag: Int64, page_size: int) -> LocalBatch:
        """The same rows so many positions earlier, by request [requests]: where they really are."""
        owner = np.arange(self.num_requests).repeat(self.query_lens)
        positions = self.positions - lag[owner]
        return replace(
            self,
            positions=positions,
            slot_mapping=slots_of(self.page_table, owner, positions, page_size),
            seq_lens=(self.seq_lens - lag).astype(np.int32),
            lag_rows=_empty_ids(),
        )

    @classmethod
    def empty(cls) -> LocalBatch:
        """The idle rank: zero rows."""
        long, short = np.zeros(0, np.int64), np.zeros(0, np.int32)
        return cls(
            token_ids=long,
            future_token_index=long,
            positions=long,
            slot_mapping=long,
            request_ids=long,
            query_lens=short,
            seq_lens=short,
            page_table=np.zeros((0, 0), np.int32),
            sample_rows=long,
        )
