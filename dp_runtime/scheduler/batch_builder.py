"""From scheduled decodes and prefill chunks to the LocalBatch of every pass of a program."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dp_runtime.core.batch import Bool, Float32, Int32, Int64, LocalBatch, slots_of
from dp_runtime.core.program import Pass, Program
from dp_runtime.core.sample_positions import SamplePositions
from dp_runtime.scheduler.request_table import RequestTable
from dp_runtime.scheduler.scheduler_output import Chunk, SchedulerOutput


def build_batches(
    table: RequestTable,
    decodes: Int64,
    chunks: Sequence[Chunk],
    page_size: int,
    program: Program,
) -> SchedulerOutput:
    """The table's rows in `decodes` decode, or are verified; the chunks follow them."""
    layout = _Layout.of(table, decodes, chunks, page_size, program.query_len(Pass.TARGET))
    target = _target_batch(layout)
    drafts = _draft_batches(layout, program.passes.count(Pass.DRAFT))
    extend = [_extend_batch(layout, target)] if program.num_drafts else []
    return SchedulerOutput(
        (*drafts, target, *extend), decodes, tuple(chunks), layout.rows, layout.sampled,
        _samples(layout), program.num_drafts,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the rows of the target pass lie; those of draft_extend lie alike."""

    table: RequestTable
    decodes: Int64
    chunks: Sequence[Chunk]
    page_size: int
    query_len: int  # of a decode: 1, or more for a verification
    rows: Int64  # [requests] in the request table
    query_lens: Int64  # [requests]
    row_ends: Int64  # [requests]
    samples: np.ndarray[tuple[int], np.dtype[np.bool_]]  # [requests] which of them sample

    @classmethod
    def of(
        cls,
        table: RequestTable,
        decodes: Int64,
        chunks: Sequence[Chunk],
        page_size: int,
        query_len: int,
    ) -> _Layout:
        rows = np.concatenate([decodes, np.array([c.live.row for c in chunks], np.int64)])
        query_lens = np.full(len(rows), query_len, np.int64)
        query_lens[len(decodes) :] = [chunk.length for chunk in chunks]
        samples = np.ones(len(rows), np.bool_)
        samples[len(decodes) :] = [chunk.samples for chunk in chunks]
        ends = query_lens.cumsum()
        return cls(table, decodes, chunks, page_size, query_len, rows, query_lens, ends, samples)

    @property
    def sampled(self) -> Int64:
        return self.rows[self.samples]

    @property
    def num_drafts(self) -> int:
        return self.query_len - 1

    @property
    def decode_rows(self) -> int:
        return len(self.decodes) * self.query_len

    @property
    def chunk_starts(self) -> Int64:
        """The first row of each chunk."""
        starts: Int64 = (self.row_ends - self.query_lens)[len(self.decodes) :]
        return starts

    @property
    def chunk_ends(self) -> Int64:
        """The last row of each chunk."""
        return self.row_ends[len(self.decodes) :] - 1


def _target_batch(layout: _Layout) -> LocalBatch:
    table, decodes, chunks = layout.table, layout.decodes, layout.chunks
    rows, query_lens, row_ends = layout.rows, layout.query_lens, layout.row_ends
    starts = table.num_computed[rows]
    owner = np.arange(len(rows)).repeat(query_lens)
    positions = np.arange(len(owner)) + (starts - (row_ends - query_lens))[owner]
    page_table = _page_table(table, rows)
    sampling = layout.samples[len(decodes) :]
    score_rows = _score_rows(chunks, layout.chunk_starts)
    embed_rows, embeds = _embeds(chunks, layout.chunk_starts, 0)
    tokens, sources = _decode_tokens(layout)
    return LocalBatch(
        token_ids=np.concatenate([tokens, *(c.live.tokens(c.start, c.end) for c in chunks)]),
        future_token_index=_padded(sources, len(owner)),
        positions=positions,
        slot_mapping=slots_of(page_table, owner, positions, layout.page_size),
        query_lens=query_lens.astype(np.int32),
        seq_lens=(starts + query_lens).astype(np.int32),
        page_table=page_table,
        sample_rows=np.concatenate(
            [np.arange(layout.decode_rows), layout.chunk_ends[sampling], *score_rows]
        ),
        lengths_are_bounds=_are_bounds(layout, rows),
        embed_rows=embed_rows,
        embeds=embeds,
    )


def _decode_tokens(layout: _Layout) -> tuple[Int64, Int64]:
    """Tokens of the decodes' rows, and where they come from.

    That is what the last step sampled; or this step's chains, which begin with the last token.
    """
    table, decodes = layout.table, layout.decodes
    if not layout.num_drafts:
        return table.last_token[decodes], table.future_token_index(decodes)
    return np.zeros(layout.decode_rows, np.int64), np.arange(layout.decode_rows)


def _draft_batches(layout: _Layout, count: int) -> Iterator[LocalBatch]:
    """One row of every decode a pass, the draft of the pass before: all tokens are pending."""
    table, decodes = layout.table, layout.decodes
    each = np.arange(len(decodes))
    nothing, ones = np.zeros(len(decodes), np.int64), np.ones(len(decodes), np.int32)
    page_table, first = _page_table(table, decodes), table.num_computed[decodes]
    are_bounds = _are_bounds(layout, decodes)
    for positions in (first + index for index in range(count)):
        yield LocalBatch(
            token_ids=nothing,
            future_token_index=each,
            positions=positions,
            slot_mapping=slots_of(page_table, each, positions, layout.page_size),
            query_lens=ones,
            seq_lens=(positions + 1).astype(np.int32),
            page_table=page_table,
            sample_rows=each,
            lengths_are_bounds=are_bounds,
        )


def _are_bounds(layout: _Layout, rows: Int64) -> Bool:
    """Whose last step is not committed; empty without drafts, where the projection is exact."""
    if not layout.num_drafts:
        return np.zeros(0, np.bool_)
    return np.asarray(layout.table.num_launched[rows] > 0)


def _extend_batch(layout: _Layout, target: LocalBatch) -> LocalBatch:
    """The target's rows, each with the token that follows its own; samples are pending tokens.

    sample_rows: of each request in turn, a verification's first row or a chunk's last.
    """
    chunks, decode_rows = layout.chunks, layout.decode_rows
    tokens, sources = np.zeros(target.num_tokens, np.int64), np.full(target.num_tokens, -1)
    sources[:decode_rows] = np.arange(decode_rows)
    pending = decode_rows
    for chunk, start, end in zip(chunks, layout.chunk_starts, layout.chunk_ends, strict=True):
        known = chunk.end - chunk.samples  # what the chunk itself samples is not known yet
        tokens[start : start + known - chunk.start] = chunk.live.tokens(chunk.start + 1, known + 1)
        if chunk.samples:
            sources[end] = pending
            pending += 1
    embed_rows, embeds = _embeds(chunks, layout.chunk_starts, 1)
    first_rows = np.arange(0, decode_rows, layout.query_len)
    return replace(
        target,
        token_ids=tokens,
        future_token_index=sources,
        sample_rows=np.concatenate([first_rows, layout.chunk_ends]),
        embed_rows=embed_rows,
        embeds=embeds,
    )


def _samples(layout: _Layout) -> SamplePositions:
    table, sampled = layout.table, layout.sampled
    if not layout.num_drafts:
        indices = table.num_known[sampled] - table.num_prompt[sampled]
        return SamplePositions(table.request_ids[sampled], indices)
    counts = np.ones(len(sampled), np.int64)
    counts[: len(layout.decodes)] = layout.query_len
    within = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)
    first = table.num_known[sampled] - table.num_prompt[sampled]
    return SamplePositions(table.request_ids[sampled].repeat(counts), first.repeat(counts) + within)


def _page_table(table: RequestTable, rows: Int64) -> Int32:
    pages: Int32 = table.page_table[rows, : table.num_pages[rows].max(initial=0)]
    return pages


def _padded(sources: Int64, num_rows: int) -> Int64:
    padded = np.full(num_rows, -1, np.int64)
    padded[: len(sources)] = sources
    return padded


def _score_rows(chunks: Sequence[Chunk], row_starts: Int64) -> list[Int64]:
    """The rows that score, chunk by chunk."""
    return [
        np.arange(chunk.score_start, chunk.score_end) - chunk.start + row_start
        for chunk, row_start in zip(chunks, row_starts, strict=True)
        if chunk.scores
    ]


def _embeds(chunks: Sequence[Chunk], row_starts: Int64, ahead: int) -> tuple[Int64, Float32]:
    """Rows whose token's embedding the request brought along, and those embeddings.

    ahead: how many positions behind a row's own its token has.
    """
    rows, values = [], []
    for chunk, row_start in zip(chunks, row_starts, strict=True):
        embeds = chunk.live.request.embeds
        if embeds is not None:
            positions = embeds.positions - ahead
            inside = (positions >= chunk.start) & (positions < chunk.end)
            rows.append(positions[inside] - chunk.start + row_start)
            values.append(embeds.values[inside])
    if not rows:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    return np.concatenate(rows), np.concatenate(values)
