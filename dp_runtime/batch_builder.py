"""From scheduled parts of requests to the LocalBatch of a slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.batch import LocalBatch
from dp_runtime.live_request import LiveRequest
from dp_runtime.sampling import SampleRow


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens [start, end) of one request in a step, as the request stood when it was scheduled."""

    live: LiveRequest
    start: int
    end: int
    samples: bool  # its last row yields a new token
    output_index: int  # of that token
    score_start: int  # prompt positions [score_start, score_end) get log probabilities
    score_end: int

    @classmethod
    def of(cls, live: LiveRequest, length: int) -> Part:
        """The next `length` tokens of a request."""
        start, end = live.num_computed, live.num_computed + length
        scored = live.request.params.prompt_logprobs is not None
        score_start = max(start, live.num_scored)
        score_end = max(score_start, min(end, live.num_prompt - 1)) if scored else score_start
        return cls(
            live, start, end, length == live.num_needed, live.num_outputs, score_start, score_end
        )

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def prompt_tokens(self) -> int:
        return max(0, min(self.end, self.live.num_prompt) - self.start)


@dataclass(frozen=True, eq=False)
class BuiltBatch:
    """A batch, and whose its sample rows are: first those that sample, then those that score."""

    batch: LocalBatch
    samples: tuple[SampleRow, ...]
    scored: tuple[Part, ...]


def build_batch(parts: Sequence[Part], page_size: int) -> BuiltBatch:
    """The rows of `parts`, one after the other."""
    if not parts:
        return BuiltBatch(LocalBatch.empty(), (), ())
    query_lens = np.array([part.length for part in parts], np.int32)
    row_starts = np.cumsum(query_lens) - query_lens
    owner = np.repeat(np.arange(len(parts)), query_lens)
    starts = np.array([part.start for part in parts], np.int64)
    positions = np.arange(len(owner)) - row_starts[owner] + starts[owner]
    token_ids = np.concatenate([part.live.tokens[part.start : part.end] for part in parts])
    sources = np.full(len(owner), -1, np.int64)
    for part, start in zip(parts, row_starts, strict=True):
        if part.live.num_pending:  # its last token is still on the device
            sources[start + part.length - 1] = part.live.source_row
    page_table = _page_table(parts)
    pages = page_table[owner, positions // page_size].astype(np.int64)
    sampling = [part for part in parts if part.samples]
    scored = [part for part in parts if part.score_end > part.score_start]
    ends = {id(part): int(start) for part, start in zip(parts, row_starts, strict=True)}
    sample_rows = [ends[id(part)] + part.length - 1 for part in sampling]
    for part in scored:
        first = ends[id(part)] + part.score_start - part.start
        sample_rows += range(first, first + part.score_end - part.score_start)
    embed_rows, embeds = _embeds(parts, row_starts)
    batch = LocalBatch(
        token_ids=token_ids,
        token_sources=sources,
        positions=positions,
        slot_mapping=pages * page_size + positions % page_size,
        request_ids=np.array([part.live.request_id for part in parts], np.int64),
        query_lens=query_lens,
        seq_lens=np.array([part.end for part in parts], np.int32),
        page_table=page_table,
        sample_rows=np.array(sample_rows, np.int64),
        embed_rows=embed_rows,
        embeds=embeds,
    )
    samples = tuple(SampleRow(part.live.request_id, part.output_index) for part in sampling)
    return BuiltBatch(batch, samples, tuple(scored))


def _page_table(parts: Sequence[Part]) -> np.ndarray[tuple[int, int], np.dtype[np.int32]]:
    table = np.zeros((len(parts), max(part.live.num_pages for part in parts)), np.int32)
    for row, part in enumerate(parts):
        table[row, : part.live.num_pages] = part.live.page_ids[: part.live.num_pages]
    return table


def _embeds(
    parts: Sequence[Part], row_starts: np.ndarray[tuple[int], np.dtype[np.int64]]
) -> tuple[
    np.ndarray[tuple[int], np.dtype[np.int64]], np.ndarray[tuple[int, int], np.dtype[np.float32]]
]:
    """Rows of the batch whose embedding the request brought along, and those embeddings."""
    rows, values = [], []
    for part, row_start in zip(parts, row_starts, strict=True):
        embeds = part.live.request.embeds
        if embeds is not None:
            inside = (embeds.positions >= part.start) & (embeds.positions < part.end)
            rows.append(embeds.positions[inside] - part.start + row_start)
            values.append(embeds.values[inside])
    if not rows:
        return np.zeros(0, np.int64), np.zeros((0, 0), np.float32)
    return np.concatenate(rows), np.concatenate(values)
