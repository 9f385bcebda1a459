"""A batch from lengths and a page table, for examples that call attention by themselves."""

from __future__ import annotations

import numpy as np

from dp_runtime.core.batch import Int32, LocalBatch


def paged_batch(
    query_lens: Int32, seq_lens: Int32, page_table: Int32, page_size: int
) -> LocalBatch:
    """Each request's last query_len tokens, on the pages of its row; its last row is sampled."""
    owner = np.repeat(np.arange(len(query_lens)), query_lens)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(query_lens) - query_lens, query_lens)
    positions = ((seq_lens - query_lens)[owner] + within).astype(np.int64)
    pages = page_table[owner, positions // page_size].astype(np.int64)
    return LocalBatch(
        token_ids=np.zeros(len(owner), np.int64),
        future_token_index=np.full(len(owner), -1, np.int64),
        positions=positions,
        slot_mapping=pages * page_size + positions % page_size,
        query_lens=query_lens,
        seq_lens=seq_lens,
        page_table=page_table,
        sample_rows=np.cumsum(query_lens).astype(np.int64) - 1,
    )
