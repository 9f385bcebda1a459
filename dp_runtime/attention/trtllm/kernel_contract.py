"""Comparisons of what a kernel call reads about its group with the pass's metadata."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from dp_runtime.attention.contract import (
    Comparison,
    offsets,
    tensor_comparisons,
    value_comparisons,
)
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup, causal_mask, mask_words
from dp_runtime.core.attention_metadata import AttentionMetadata

CPU = torch.device("cpu")


def members_comparisons(
    groups: Iterable[KernelGroup], metadata: AttentionMetadata
) -> Iterable[Comparison]:
    """Check that each request is in exactly one group."""
    members = np.sort(np.concatenate([group.members for group in groups]))
    everyone = np.arange(len(metadata.query_lens_host))
    if not np.array_equal(members, everyone):
        yield "requests of all groups", members.tolist(), everyone.tolist()


def group_comparisons(
    group: KernelGroup, metadata: AttentionMetadata, spec: AttentionSpec, device: torch.device
) -> Iterable[Comparison]:
    """Compare every field of a group with the host mirrors of its members."""
    query_lens = metadata.query_lens_host[group.members]
    seq_lens = metadata.seq_lens_host[group.members]
    requests, rows = len(query_lens), int(query_lens.sum())
    yield "num_rows of a group", group.num_rows, rows
    found = group.rows.stop - group.rows.start if isinstance(group.rows, slice) else len(group.rows)
    yield "rows of a group", found, rows
    yield "max_query_len of a group", group.max_query_len, int(query_lens.max())
    yield "max_seq_len of a group", group.max_seq_len, int(seq_lens.max())
    if group.query_len is not None and (query_lens != group.query_len).any():
        yield "query_len of a group", [group.query_len] * requests, query_lens.tolist()
    words = mask_words(group.query_len) if group.query_len and group.query_len > 1 else 0
    found_mask = None if group.mask is None else tuple(group.mask.shape)
    yield "mask shape of a group", found_mask, (requests, group.query_len, words) if words else None
    width = metadata.page_table_host.shape[1]
    tensors = {
        "cu_seqlens_q": ((requests + 1,), torch.int32),
        "cu_seqlens_kv": ((requests + 1,), torch.int32),
        "seq_lens": ((requests,), torch.int32),
        "page_table": ((requests, width), torch.int32),
        **({"mask": ((requests, group.query_len or 0, words), torch.uint16)} if words else {}),
    }
    for name, (shape, dtype) in tensors.items():
        tensor = getattr(group, name)
        yield from tensor_comparisons(f"{name} of a group", tensor, shape, dtype, device)
    if spec.check_device_values:
        yield from _group_values(group, metadata)


def _group_values(group: KernelGroup, metadata: AttentionMetadata) -> Iterable[Comparison]:
    query_lens = metadata.query_lens_host[group.members]
    seq_lens = metadata.seq_lens_host[group.members]
    table = metadata.page_table_host[group.members]
    starts = offsets(metadata.query_lens_host)[group.members]
    rows = np.concatenate([np.arange(at, at + n) for at, n in zip(starts, query_lens)])
    found = torch.arange(metadata.num_tokens)[
        group.rows if isinstance(group.rows, slice) else group.rows.cpu()
    ]
    yield from value_comparisons("rows of a group", found, rows)
    yield from value_comparisons("cu_seqlens_q of a group", group.cu_seqlens_q, offsets(query_lens))
    yield from value_comparisons("cu_seqlens_kv of a group", group.cu_seqlens_kv, offsets(seq_lens))
    yield from value_comparisons("seq_lens of a group", group.seq_lens, seq_lens)
    yield from value_comparisons("page_table of a group", group.page_table, table)
    if group.mask is not None:
        due = causal_mask(len(query_lens), group.mask.shape[1], CPU).numpy()
        yield from value_comparisons("mask of a group", group.mask, due)
