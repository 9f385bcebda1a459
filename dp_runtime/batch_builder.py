"""From scheduled decodes and prefill chunks to the LocalBatch of a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.batch import Float32, Int64, LocalBatch
from dp_runtime.live_request import LiveRequest
from dp_runtime.request_table import RequestTable
from dp_runtime.sampling import SampleRows


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, end) of one prefilling request in a step, as it stood when scheduled."""

    live: LiveRequest
    start: int
    end: int
    samples: bool  # its last row yields a new token
    score_start: int  # prompt positions [score_start, score_end) get log probabilities
    score_end: int

    @classmethod
    def of(cls, live: LiveRequest, start: int, needed: int, budget: int) -> Chunk:
        """As many as the budget allows of the tokens that a request needs."""
        end = start + min(needed, budget)
        scored = live.request.params.prompt_logprobs is not None
        score_start = max(start, live.num_scored)
        score_end = max(score_start, min(end, live.num_prompt - 1)) if scored else score_start
        return cls(live, start, end, needed <= budget, score_start, score_end)

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def prompt_tokens(self) -> int:
        return max(0, min(self.end, self.live.num_prompt) - self.start)

    @property
    def scores(self) -> bool:
        return self.score_end > self.score_start


@dataclass(frozen=True, eq=False)
class BuiltBatch:
    """A batch, and whose its sample rows are: first those that sample, then those that score."""

    batch: LocalBatch
    rows: Int64  # [requests] in the request table
    sampled: Int64  # [samples] those of `rows` that sample
    samples: SampleRows


def build_batch(
    table: RequestTable, decodes: Int64, chunks: Sequence[Chunk], page_size: int
) -> BuiltBatch:
    """One token of each of the table's rows in `decodes`, then the chunks, one after the other."""
    rows = np.concatenate([decodes, np.array([chunk.live.row for chunk in chunks], np.int64)])
    query_lens = np.ones(len(rows), np.int64)
    query_lens[len(decodes) :] = [chunk.length for chunk in chunks]
    row_ends = query_lens.cumsum()
    row_starts = row_ends - query_lens
    starts = table.num_computed[rows]
    owner = np.arange(len(rows)).repeat(query_lens)
    positions = np.arange(len(owner)) + (starts - row_starts)[owner]
    sources = np.full(len(owner), -1, np.int64)
    sources[: len(decodes)] = table.token_sources(decodes)
    page_table = table.page_table[rows, : table.num_pages[rows].max(initial=0)]
    pages = page_table[owner, positions // page_size].astype(np.int64)
    samples = np.ones(len(rows), np.bool_)
    samples[len(decodes) :] = [chunk.samples for chunk in chunks]
    sampled = rows[samples]
    chunk_starts = row_starts[len(decodes) :]
    embed_rows, embeds = _embeds(chunks, chunk_starts)
    batch = LocalBatch(
        token_ids=np.concatenate(
            [table.last_token[decodes], *(c.live.tokens(c.start, c.end) for c in chunks)]
        ),
        token_sources=sources,
        positions=positions,
        slot_mapping=pages * page_size + positions % page_size,
        request_ids=table.request_ids[rows],
        query_lens=query_lens.astype(np.int32),
        seq_lens=(starts + query_lens).astype(np.int32),
        page_table=page_table,
        sample_rows=np.concatenate([row_ends[samples] - 1, *_score_rows(chunks, chunk_starts)]),
        embed_rows=embed_rows,
        embeds=embeds,
    )
    output_indices = table.num_known[sampled] - table.num_prompt[sampled]
    return BuiltBatch(batch, rows, sampled, SampleRows(table.request_ids[sampled], output_indices))


def _score_rows(chunks: Sequence[Chunk], row_starts: Int64) -> list[Int64]:
    """The rows that score, chunk by chunk."""
    return [
        np.arange(chunk.score_start, chunk.score_end) - chunk.start + row_start
        for chunk, row_start in zip(chunks, row_starts, strict=True)
        if chunk.scores
    ]


def _embeds(chunks: Sequence[Chunk], row_starts: Int64) -> tuple[Int64, Float32]:
    """Rows of the batch whose embedding the request brought along, and those embeddings."""
    rows, values = [], []
    for chunk, row_start in zip(chunks, row_starts, strict=True):
        embeds = chunk.live.request.embeds
        if embeds is not None:
            inside = (embeds.positions >= chunk.start) & (embeds.positions < chunk.end)
            rows.append(embeds.positions[inside] - chunk.start + row_start)
            values.append(embeds.values[inside])
    if not rows:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    return np.concatenate(rows), np.concatenate(values)
