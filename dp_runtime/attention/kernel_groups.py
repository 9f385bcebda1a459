"""KernelPlanner: splits a slot's requests into groups that one GPU kernel call serves each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.batch import Int32, Int64
from dp_runtime.metadata import AttentionMetadata

MASK_WORD_BITS = 16


@dataclass(frozen=True, eq=False)
class KernelGroup:
    """Requests of a slot that one call serves, and what that call reads about them."""

    rows: slice | Tensor  # where their rows lie in the slot; an index [rows] if not in one piece
    num_rows: int
    query_len: int | None  # of every request, for a decode or a verification; None: prefill
    cu_seqlens_q: Tensor  # [requests + 1] int32
    cu_seqlens_kv: Tensor  # [requests + 1] int32
    seq_lens: Tensor  # [requests] int32
    page_table: Tensor  # [requests, pages] int32
    max_query_len: int
    max_seq_len: int
    mask: Tensor | None  # [requests, query_len, words] uint16, for verifications

    @property
    def batch_size(self) -> int:
        return self.seq_lens.shape[0]


class KernelPlanner:
    """Plans the groups of a metadata once, for all layers that share the planner.

    decode_query_lens: query lengths that have a decode kernel of their own; every other request
    goes to the prefill kernel.
    """

    def __init__(self, decode_query_lens: frozenset[int]) -> None:
        self.decode_query_lens = decode_query_lens
        self._last: tuple[AttentionMetadata, tuple[KernelGroup, ...]] | None = None

    def plan(self, metadata: AttentionMetadata) -> tuple[KernelGroup, ...]:
        if self._last is None or self._last[0] is not metadata:
            self._last = (metadata, tuple(self._build(metadata)))
        return self._last[1]

    def _build(self, metadata: AttentionMetadata) -> list[KernelGroup]:
        query_lens = metadata.query_lens_host
        decoding = np.isin(query_lens, list(self.decode_query_lens))
        groups = [
            build_group(metadata, np.flatnonzero(query_lens == length), int(length))
            for length in np.unique(query_lens[decoding])
        ]
        prefilling = np.flatnonzero(~decoding)
        return [*groups, build_group(metadata, prefilling, None)] if len(prefilling) else groups


def build_group(metadata: AttentionMetadata, members: Int64, query_len: int | None) -> KernelGroup:
    """The group of some of a slot's requests; `members` are their numbers, ascending."""
    device = metadata.seq_lens.device
    query_lens, seq_lens = metadata.query_lens_host[members], metadata.seq_lens_host[members]
    starts = np.cumsum(metadata.query_lens_host) - metadata.query_lens_host
    in_one_piece = members[-1] - members[0] + 1 == len(members)
    first = int(starts[members[0]])
    num_rows = int(query_lens.sum())
    index = np.concatenate([np.arange(starts[m], starts[m] + metadata.query_lens_host[m])
                            for m in members])  # fmt: skip
    whole = slice(int(members[0]), int(members[-1]) + 1)
    which = whole if in_one_piece else torch.from_numpy(members).to(device)
    return KernelGroup(
        rows=slice(first, first + num_rows) if in_one_piece else torch.from_numpy(index).to(device),
        num_rows=num_rows,
        query_len=query_len,
        cu_seqlens_q=_offsets(query_lens, device),
        cu_seqlens_kv=_offsets(seq_lens, device),
        seq_lens=metadata.seq_lens[which],
        page_table=metadata.page_table[which],
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        mask=causal_mask(len(members), query_len, device) if query_len and query_len > 1 else None,
    )


def causal_mask(batch_size: int, query_len: int, device: torch.device) -> Tensor:
    """XQA's packed mask, [batch, query_len, words] uint16: row i sees the new tokens 0..i.

    NOTE: a row is padded to 32 bits, that is to two words even for a few tokens; with one word the
    kernel reads the next row's and the result is wrong by some percent without a complaint.
    """
    words = -(-query_len // 32) * 2
    rows = np.zeros((query_len, words), np.uint16)
    for row in range(query_len):
        for bit in range(row + 1):
            rows[row, bit // MASK_WORD_BITS] |= 1 << (bit % MASK_WORD_BITS)
    return torch.from_numpy(rows).to(device).expand(batch_size, -1, -1).contiguous()


def _offsets(lengths: Int32, device: torch.device) -> Tensor:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return torch.from_numpy(offsets).to(device)
