"""Groups of a pass's queries, each of which one batched product serves."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.core.attention_metadata import AttentionMetadata

QUERY_BLOCK = 256  # query rows of a piece: bounds masks, and skips keys that no row may see
PAIR_BUDGET = 2**18  # (query row, key) pairs of a group of several pieces


@dataclass(frozen=True)
class QueryPiece:
    request: int
    first_row: int
    query_len: int
    kv_len: int  # keys that the last row sees


@dataclass(frozen=True, eq=False)
class QueryGroup:
    """Pieces of equal query length and similar kv length."""

    rows: Tensor  # [pieces, query_len] int64
    blocks: Tensor  # [2, pieces, num_kv_heads, pages] int64, rows of the pool by (page, k/v, head)
    beyond: Tensor  # [n] int64, tokens of the gathered blocks past the end of their piece
    kv_len: int  # of the longest piece
    mask: Tensor | None  # [pieces, 1, query_len, kv_len] float32, 0 or -inf; None: all visible


def build_groups(
    metadata: AttentionMetadata, num_kv_heads: int, page_size: int
) -> tuple[QueryGroup, ...]:
    return tuple(
        build_group(members, metadata.page_table, num_kv_heads, page_size)
        for members in group_pieces(split_queries(metadata), page_size)
    )


def split_queries(metadata: AttentionMetadata) -> list[QueryPiece]:
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
    """Group equal query lengths, kv lengths within a factor of two, and few enough pairs."""
    alike: dict[tuple[int, int], list[QueryPiece]] = defaultdict(list)
    for piece in pieces:
        alike[piece.query_len, (piece.kv_len // page_size).bit_length()].append(piece)
    groups = []
    for members in alike.values():
        longest = max(piece.kv_len for piece in members)
        size = max(1, PAIR_BUDGET // (members[0].query_len * longest))
        groups += [members[i : i + size] for i in range(0, len(members), size)]
    return groups


def build_group(
    members: list[QueryPiece], page_table: Tensor, num_kv_heads: int, page_size: int
) -> QueryGroup:
    device, query_len = page_table.device, members[0].query_len
    requests, first_rows, kv_lens = (
        torch.tensor(column, device=device)
        for column in zip(*((p.request, p.first_row, p.kv_len) for p in members))
    )
    kv_len = max(piece.kv_len for piece in members)
    within = torch.arange(query_len, device=device)
    pages = page_table[requests, : -(-kv_len // page_size)].long()
    half = torch.arange(2, device=device)[:, None, None, None]
    head = torch.arange(num_kv_heads, device=device)[:, None]
    blocks = (pages[:, None, :] * 2 + half) * num_kv_heads + head
    ragged = any(piece.kv_len < kv_len for piece in members)
    last_seen = (kv_lens - query_len)[:, None] + within
    return QueryGroup(
        rows=first_rows[:, None] + within,
        blocks=blocks,
        beyond=tokens_beyond(kv_lens, blocks, page_size),
        kv_len=kv_len,
        mask=causal_mask(last_seen, kv_len) if ragged or query_len > 1 else None,
    )


def tokens_beyond(kv_lens: Tensor, blocks: Tensor, page_size: int) -> Tensor:
    """Find tokens past kv_lens in the flat [2, pieces, num_kv_heads, pages * page_size]."""
    capacity = blocks.shape[-1] * page_size
    past = torch.arange(capacity, device=kv_lens.device) >= kv_lens[:, None, None]
    return past.expand(*blocks.shape[:-1], capacity).flatten().nonzero().squeeze(1)


def causal_mask(last_seen: Tensor, kv_len: int) -> Tensor:
    """Turn last_seen [pieces, query_len] into [pieces, 1, query_len, kv_len], 0 or -inf."""
    hidden = torch.arange(kv_len, device=last_seen.device) > last_seen[:, None, :, None]
    return torch.zeros(hidden.shape, device=hidden.device).masked_fill_(hidden, -torch.inf)
