"""Groups of a pass's requests, each of which one GPU kernel call serves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dp_runtime.attention.contract import offsets
from dp_runtime.core.attention_metadata import AttentionMetadata
from dp_runtime.core.batch import Int32, Int64
from dp_runtime.core.device_copy import all_on_device, on_device

MASK_WORD_BITS = 16


@dataclass(frozen=True, eq=False)
class KernelGroup:
    """Requests that one call serves, and what it reads about them."""

    members: Int64  # [requests] their numbers in the pass, ascending
    rows: slice | Tensor  # their rows of the pass: a slice, or an index [rows] if scattered
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
        return len(self.members)


def build_groups(
    metadata: AttentionMetadata, decode_query_lens: frozenset[int]
) -> tuple[KernelGroup, ...]:
    """Group requests of each decode length for a decode kernel, and all others for prefill."""
    query_lens = metadata.query_lens_host
    decoding = np.isin(query_lens, list(decode_query_lens))
    groups = [
        build_group(metadata, np.flatnonzero(query_lens == length), int(length))
        for length in np.unique(query_lens[decoding])
    ]
    prefilling = np.flatnonzero(~decoding)
    if len(prefilling):
        groups.append(build_group(metadata, prefilling, None))
    return tuple(groups)


def build_group(metadata: AttentionMetadata, members: Int64, query_len: int | None) -> KernelGroup:
    device = metadata.seq_lens.device
    query_lens, seq_lens = metadata.query_lens_host[members], metadata.seq_lens_host[members]
    starts = offsets(metadata.query_lens_host)[members]
    in_one_piece = members[-1] - members[0] + 1 == len(members)
    first, num_rows = int(starts[0]), int(query_lens.sum())
    whole = slice(int(members[0]), int(members[-1]) + 1)
    row_ids = _rows(starts, query_lens)
    arrays = (offsets(query_lens), offsets(seq_lens), members, row_ids)
    cu_seqlens_q, cu_seqlens_kv, member_ids, rows = all_on_device(arrays, device)
    requests = whole if in_one_piece else member_ids
    return KernelGroup(
        members=members,
        rows=slice(first, first + num_rows) if in_one_piece else rows,
        num_rows=num_rows,
        query_len=query_len,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        seq_lens=metadata.seq_lens[requests],
        page_table=metadata.page_table[requests],
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        mask=causal_mask(len(members), query_len, device) if query_len and query_len > 1 else None,
    )


def _rows(starts: Int32, lengths: Int32) -> Int64:
    """List start, start + 1, ... of every request, one after the other."""
    within = np.arange(int(lengths.sum())) - np.repeat(offsets(lengths)[:-1], lengths)
    return np.repeat(starts, lengths).astype(np.int64) + within


def mask_words(query_len: int) -> int:
    """Count the uint16 words of a row of XQA's mask, padded to 32 bits."""
    return -(-query_len // 32) * 2  # NOTE: with one word a row, results are silently wrong


def causal_mask(batch_size: int, query_len: int, device: torch.device) -> Tensor:
    """Pack XQA's mask, [batch, query_len, words] uint16: row i sees the new tokens 0..i."""
    rows = np.zeros((query_len, mask_words(query_len)), np.uint16)
    for row in range(query_len):
        for bit in range(row + 1):
            rows[row, bit // MASK_WORD_BITS] |= 1 << (bit % MASK_WORD_BITS)
    return on_device(rows, device).expand(batch_size, -1, -1).contiguous()
