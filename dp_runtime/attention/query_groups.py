"""QueryPlanner: splits a slot's queries into groups that one batched product can serve."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.metadata import AttentionMetadata

QUERY_BLOCK = 256  # most query rows in a piece: bounds masks, and skips keys no row may see
PAIR_BUDGET = 2**18  # most (query row, key) pairs in a group of several pieces


@dataclass(frozen=True)
class QueryPiece:
    """Consecutive query rows of one request; the last one sees kv_len keys."""

    request: int
    first_row: int
    query_len: int
    kv_len: int


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """Pieces of equal query length and similar kv length."""

    rows: Tensor  # [pieces, query_len] int64
    pages: Tensor  # [pieces, pages] int64
    kv_len: int  # of the longest piece
    mask: Tensor | None  # [pieces, 1, query_len, kv_len] float32, 0 or -inf; None: all visible
    beyond: Tensor | None  # [pieces, 1, kv_len, 1] bool, keys past a piece's own kv_len


class QueryPlanner:
    """Groups a metadata's queries once, for all layers that share the planner."""

    def __init__(self) -> None:
        self._metadata: AttentionMetadata | None = None
        self._groups: tuple[QueryGroup, ...] = ()

    def groups(self, metadata: AttentionMetadata, page_size: int) -> tuple[QueryGroup, ...]:
        if metadata is not self._metadata:
            pieces = split_queries(metadata)
            self._groups = tuple(
                build_group(members, metadata.page_table, page_size)
                for members in group_pieces(pieces, page_size)
            )
            self._metadata = metadata
        return self._groups


def split_queries(metadata: AttentionMetadata) -> list[QueryPiece]:
    """Every request's query rows, in pieces of QUERY_BLOCK at most."""
    pieces, row = [], 0
    lengths = zip(metadata.query_lens_host.tolist(), metadata.seq_lens_host.tolist())
    for request, (query_len, seq_len) in enumerate(lengths):
        for start in range(0, query_len, QUERY_BLOCK):
            size = min(QUERY_BLOCK, query_len - start)
            kv_len = seq_len - query_len + start + size
            pieces.append(QueryPiece(request, row + start, size, kv_len))
        row += query_len
    return pieces


def group_pieces(pieces: list[QueryPiece], page_size: int) -> list[list[QueryPiece]]:
    """Equal query lengths, kv lengths within a factor of two, and a bounded number of pairs."""
    alike: dict[tuple[int, int], list[QueryPiece]] = defaultdict(list)
    for piece in pieces:
        alike[piece.query_len, (piece.kv_len // page_size).bit_length()].append(piece)
    groups = []
    for members in alike.values():
        longest = max(piece.kv_len for piece in members)
        size = max(1, PAIR_BUDGET // (members[0].query_len * longest))
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return groups


def build_group(members: list[QueryPiece], page_table: Tensor, page_size: int) -> QueryGroup:
    """Index tensors of one group, on the page table's device."""
    query_len, device = members[0].query_len, page_table.device
    requests, first_rows, kv_lens = (
        torch.tensor(np.array(column), device=device)
        for column in zip(*((p.request, p.first_row, p.kv_len) for p in members))
    )
    kv_len = max(piece.kv_len for piece in members)
    within = torch.arange(query_len, device=device)
    keys = torch.arange(kv_len, device=device)
    last_seen = kv_lens[:, None] - query_len + within  # [pieces, query_len]
    hidden = keys > last_seen[:, :, None]
    mask = torch.zeros(hidden.shape, device=device).masked_fill_(hidden, -torch.inf)
    ragged = any(piece.kv_len < kv_len for piece in members)
    return QueryGroup(
        rows=first_rows[:, None] + within,
        pages=page_table[requests, : -(-kv_len // page_size)].long(),
        kv_len=kv_len,
        mask=mask[:, None] if ragged or query_len > 1 else None,
        beyond=(keys >= kv_lens[:, None])[:, None, :, None] if ragged else None,
    )
