"""Batches over random page tables, for tests of attention and of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.cache_spec import CacheSpec, LayerCaches

CPU = torch.device("cpu")
PLACE = Place(0, 0, "target")


def random_page_table(
    capacities: Sequence[int], page_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Shuffled pages for sequences of these capacities, and the number of pages with two spare."""
    counts = [-(-capacity // page_size) for capacity in capacities]
    num_pages = sum(counts) + 3
    pages = rng.permutation(np.arange(1, num_pages, dtype=np.int32))
    table = np.zeros((len(counts), max(counts, default=0)), np.int32)
    for row, count in enumerate(counts):
        table[row, :count], pages = pages[:count], pages[count:]
    return table, num_pages


def paged_batch(
    lengths: Sequence[tuple[int, int]],
    table: np.ndarray,
    page_size: int,
    tokens: Sequence[int] | None = None,
) -> LocalBatch:
    """(query_len, seq_len) of every request, on the pages of its row; all rows are sampled."""
    query_lens = np.array([q for q, _ in lengths], np.int32)
    seq_lens = np.array([s for _, s in lengths], np.int32)
    rows = int(query_lens.sum())
    positions = np.concatenate([np.arange(s - q, s) for q, s in lengths] or [np.zeros(0, int)])
    owner = np.repeat(np.arange(len(lengths)), query_lens)
    pages = table[owner, positions // page_size].astype(np.int64)
    return LocalBatch(
        token_ids=np.array(tokens if tokens is not None else [0] * rows, np.int64),
        future_token_index=np.full(rows, -1, np.int64),
        positions=positions.astype(np.int64),
        slot_mapping=pages * page_size + positions % page_size,
        query_lens=query_lens,
        seq_lens=seq_lens,
        page_table=table.copy(),
        sample_rows=np.arange(rows, dtype=np.int64),
    )


def spec_of(pool: torch.Tensor, num_heads: int, dtype: torch.dtype | None = None,
            **changes: Any) -> AttentionSpec:  # fmt: skip
    """What a pool [num_pages, 2, num_kv_heads, page_size, head_dim] and its queries ask for."""
    _, _, num_kv_heads, page_size, head_dim = pool.shape
    return AttentionSpec(
        num_heads, num_kv_heads, head_dim, page_size, dtype or pool.dtype, pool.dtype, **changes
    )


def metadata_of(batch: LocalBatch, num_pages: int, page_size: int) -> AttentionMetadata:
    return AttentionMetadata.build(batch, PageGeometry(num_pages, page_size), PLACE, CPU)


def attend(
    backend: AttentionBackend,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    metadata: AttentionMetadata,
    layer: int = 0,
) -> torch.Tensor:
    """Plan a pass, append k and v in one layer, and attend from q."""
    plan, paged = backend.plan(metadata), backend.layer(layer)
    KvWriter(paged.cache).append(k, v, plan)
    return paged.run(q, plan)


class ListsCaches(Protocol):
    """A configuration of a model, or of a draft model."""

    @property
    def num_heads(self) -> int: ...

    def cache_specs(
        self, page_size: int, kv_dtype: torch.dtype, dtype: torch.dtype
    ) -> tuple[CacheSpec, ...]: ...


def backend_over(
    config: ListsCaches, num_pages: int = 0, page_size: int = 4, dtype: torch.dtype = torch.float32
) -> TorchRefBackend:
    """The reference over zeroed pools of a model's layers; without pages where nothing runs."""
    pages = PageGeometry(num_pages, page_size)
    pools = LayerCaches.allocate(config.cache_specs(page_size, dtype, dtype), pages, 0, CPU).pools
    first = next(pool for pool in pools if pool is not None)
    return TorchRefBackend(spec_of(first, config.num_heads), pools)
