"""Builds the LocalBatch of every pass of a program: docs/architecture.md shows its five indices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.batch import (
    ALL_EXACT,
    AS_POSITIONS,
    NO_COUNTS,
    NO_EMBEDS,
    NO_IMAGES,
    NO_REPLAYS,
    NO_STATES,
    Bool,
    Int64,
    LocalBatch,
    RowValues,
    SamplePositions,
    StateSlots,
    slots_of,
)
from dp_runtime.core.request import PromptEmbeds
from dp_runtime.core.step_program import Pass, Program
from dp_runtime.scheduler.image_slots import PromptSlots
from dp_runtime.scheduler.page_table import PageTable
from dp_runtime.scheduler.request_table import RequestTable
from dp_runtime.scheduler.routed_rows import RoutedRows, brought_experts
from dp_runtime.scheduler.scheduler_output import Chunk, SchedulerOutput, StateMoves, StateTrack
from dp_runtime.scheduler.state_tracks import with_tracks


def build_batches(
    table: RequestTable,
    pages: PageTable,
    decodes: Int64,
    chunks: Sequence[Chunk],
    program: Program,
    states: StateMoves,
) -> SchedulerOutput:
    step = _Layout.for_step(table, pages, decodes, chunks, program.query_len(Pass.TARGET))
    target = _target_batch(step, states.tracks)
    count = program.passes.count(Pass.DRAFT)
    drafts = _draft_batches(step, count) if count else ()
    extend = [_extend_batch(step, target)] if program.num_drafts else []
    return SchedulerOutput(
        batches=(*drafts, target, *extend),
        decodes=decodes,
        chunks=tuple(chunks),
        req_indices=step.req_indices,
        sampled=step.req_indices[step.samples],
        samples=_sample_positions(step),
        num_drafts=program.num_drafts,
        routed=RoutedRows.of(
            table, step.req_indices, step.query_lens, [chunk.start for chunk in chunks]
        ),
        states=states,
    )


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the rows of the target and the draft_extend pass lie."""

    table: RequestTable
    pages: PageTable
    decodes: Int64
    chunks: Sequence[Chunk]
    query_len: int  # of a decode: 1, or more for a verification
    req_indices: Int64  # [requests]
    query_lens: Int64  # [requests]
    row_ends: Int64  # [requests] one after each request's last row
    samples: Bool  # [requests]

    @classmethod
    def for_step(
        cls,
        table: RequestTable,
        pages: PageTable,
        decodes: Int64,
        chunks: Sequence[Chunk],
        query_len: int,
    ) -> _Layout:
        of_chunks = np.array([chunk.state.req_index for chunk in chunks], np.int64)
        req_indices = np.concatenate([decodes, of_chunks])
        query_lens = np.full(len(req_indices), query_len, np.int64)
        query_lens[len(decodes) :] = [chunk.length for chunk in chunks]
        samples = np.ones(len(req_indices), np.bool_)
        samples[len(decodes) :] = [chunk.samples for chunk in chunks]
        ends = query_lens.cumsum()
        return cls(table, pages, decodes, chunks, query_len, req_indices, query_lens, ends, samples)

    @property
    def drafts(self) -> bool:
        return self.query_len > 1

    @property
    def num_decode_rows(self) -> int:
        return len(self.decodes) * self.query_len

    @property
    def chunk_first_rows(self) -> Int64:
        starts: Int64 = (self.row_ends - self.query_lens)[len(self.decodes) :]
        return starts

    @property
    def chunk_last_rows(self) -> Int64:
        return self.row_ends[len(self.decodes) :] - 1


def _target_batch(step: _Layout, tracks: Sequence[StateTrack]) -> LocalBatch:
    query_lens, row_ends = step.query_lens, step.row_ends
    first_positions = step.table.num_computed_tokens[step.req_indices]
    owner = np.arange(len(query_lens)).repeat(query_lens)
    positions = np.arange(len(owner)) + (first_positions - (row_ends - query_lens))[owner]
    page_table = step.pages.rows(step.req_indices)
    chunk_samples = step.chunk_last_rows[step.samples[len(step.decodes) :]]
    tokens, future_indices = _decode_tokens(step)
    future_token_index = np.full(len(owner), -1, np.int64)
    future_token_index[: len(future_indices)] = future_indices
    return LocalBatch(
        token_ids=np.concatenate(
            [tokens, *(chunk.token_ids[: chunk.length] for chunk in step.chunks)]
        ),
        future_token_index=future_token_index,
        positions=positions,
        slot_mapping=slots_of(page_table, owner, positions, step.pages.page_size),
        query_lens=query_lens.astype(np.int32),
        seq_lens=(first_positions + query_lens).astype(np.int32),
        page_table=page_table,
        sample_rows=np.concatenate(
            [np.arange(step.num_decode_rows), chunk_samples, *_score_rows(step)]
        ),
        lengths_are_bounds=_are_bounds(step, step.req_indices),
        rope_positions=_rope_positions(step, positions, owner),
        states=_states(step, tracks),
        embeds=_embeds(step, token_offset=0),
        images=_images(step, token_offset=0),
        replays=brought_experts(step.table, step.req_indices, owner, positions),
    )


def _states(step: _Layout, tracks: Sequence[StateTrack]) -> StateSlots:
    """Find the recurrent states of the target pass's requests, if any are kept."""
    if not step.table.keeps_state:
        return NO_STATES
    is_fresh = np.zeros(len(step.req_indices), np.bool_)
    is_fresh[len(step.decodes) :] = [chunk.is_fresh for chunk in step.chunks]
    num_drafts = NO_COUNTS
    if step.drafts:
        num_drafts = np.zeros(len(step.req_indices), np.int32)
        num_drafts[: len(step.decodes)] = step.query_len - 1
    states = StateSlots(step.table.state_slots(step.req_indices), is_fresh, num_drafts)
    return with_tracks(states, step.req_indices, tracks)


def _decode_tokens(step: _Layout) -> tuple[Int64, Int64]:
    """Return tokens and future_token_index: of the last step's samples, or this step's chains."""
    table, decodes = step.table, step.decodes
    if not step.drafts:
        return table.last_token[decodes], table.future_token_index(decodes)
    return np.zeros(step.num_decode_rows, np.int64), np.arange(step.num_decode_rows)


def _draft_batches(step: _Layout, count: int) -> Iterator[LocalBatch]:
    """Give every decode a row in each pass, which reads what the pass before drafted."""
    decodes = step.decodes
    each = np.arange(len(decodes))
    nothing, ones = np.zeros(len(decodes), np.int64), np.ones(len(decodes), np.int32)
    page_table, first = step.pages.rows(decodes), step.table.num_computed_tokens[decodes]
    are_bounds, deltas = _are_bounds(step, decodes), step.table.rope_deltas[decodes]
    for positions in (first + index for index in range(count)):
        yield LocalBatch(
            token_ids=nothing,
            future_token_index=each,
            positions=positions,
            slot_mapping=slots_of(page_table, each, positions, step.pages.page_size),
            query_lens=ones,
            seq_lens=(positions + 1).astype(np.int32),
            page_table=page_table,
            sample_rows=each,
            lengths_are_bounds=are_bounds,
            rope_positions=_shifted(positions, deltas),
        )


def _are_bounds(step: _Layout, req_indices: Int64) -> Bool:
    """Tell whose last step is in flight; without drafts, projected lengths are exact: [0]."""
    if not step.drafts:
        return ALL_EXACT
    return np.asarray(step.table.num_inflight_steps[req_indices] > 0)


def _extend_batch(step: _Layout, target: LocalBatch) -> LocalBatch:
    """Take the target's rows, each with the token that follows its own."""
    num_decode_rows = step.num_decode_rows
    tokens = np.zeros(target.num_tokens, np.int64)
    future_token_index = np.full(target.num_tokens, -1)
    future_token_index[:num_decode_rows] = np.arange(num_decode_rows)
    sample = num_decode_rows
    for chunk, first_row, last_row in zip(
        step.chunks, step.chunk_first_rows, step.chunk_last_rows, strict=True
    ):
        known = chunk.token_ids[1:]  # what the chunk itself samples is not known yet
        tokens[first_row : first_row + len(known)] = known
        if chunk.samples:
            future_token_index[last_row] = sample
            sample += 1
    first_rows = np.arange(0, num_decode_rows, step.query_len)
    return replace(
        target,
        token_ids=tokens,
        future_token_index=future_token_index,
        sample_rows=np.concatenate([first_rows, step.chunk_last_rows]),
        states=NO_STATES,  # a draft model keeps none
        embeds=_embeds(step, token_offset=1),
        images=_images(step, token_offset=1),
        replays=NO_REPLAYS,
    )


def _sample_positions(step: _Layout) -> SamplePositions:
    req_indices = step.req_indices[step.samples]
    table = step.table
    first = table.num_tokens[req_indices] - table.num_prompt_tokens[req_indices]
    if not step.drafts:
        return SamplePositions(req_indices, first)
    counts = np.ones(len(req_indices), np.int64)
    counts[: len(step.decodes)] = step.query_len
    within = np.arange(counts.sum()) - (counts.cumsum() - counts).repeat(counts)
    return SamplePositions(req_indices.repeat(counts), first.repeat(counts) + within)


def _score_rows(step: _Layout) -> list[Int64]:
    return [
        np.arange(chunk.score_start, chunk.score_end) - chunk.start + first_row
        for chunk, first_row in zip(step.chunks, step.chunk_first_rows, strict=True)
        if chunk.scores
    ]


def _embeds(step: _Layout, token_offset: int) -> RowValues:
    return _brought(step, [chunk.embeds for chunk in step.chunks], token_offset, NO_EMBEDS)


def _images(step: _Layout, token_offset: int) -> RowValues:
    return _brought(step, [chunk.images.slots for chunk in step.chunks], token_offset, NO_IMAGES)


def _brought(
    step: _Layout,
    of_chunks: Sequence[PromptEmbeds | PromptSlots | None],
    token_offset: int,
    none: RowValues,
) -> RowValues:
    """Find rows of whose token, token_offset positions after their own, a chunk has a value."""
    if all(given is None for given in of_chunks):
        return none
    rows, values = list[Int64](), list[NDArray[Any]]()
    for chunk, first_row, given in zip(step.chunks, step.chunk_first_rows, of_chunks, strict=True):
        if given is not None:
            positions = given.positions - token_offset
            inside = (positions >= chunk.start) & (positions < chunk.end)
            rows.append(positions[inside] - chunk.start + first_row)
            values.append(given.values[inside])
    return RowValues(np.concatenate(rows), np.concatenate(values))


def _rope_positions(step: _Layout, positions: Int64, owner: Int64) -> Int64:
    """Return what rows are rotated by, [3, rows]; [3, 0] where no request has images."""
    if not step.table.have_images:
        return AS_POSITIONS
    rope = _shifted(positions, step.table.rope_deltas[step.req_indices][owner])
    for chunk, first_row in zip(step.chunks, step.chunk_first_rows):
        if chunk.state.prompt_rope is not None:
            if not rope.shape[1]:
                rope = np.stack([positions] * 3)
            rope[:, first_row : first_row + chunk.length] = chunk.state.rope(chunk.start, chunk.end)
    return rope


def _shifted(positions: Int64, deltas: Int64) -> Int64:
    """Return three equal positions of each row, [3, rows]; [3, 0] where `positions` are these."""
    return np.stack([positions + deltas] * 3) if deltas.any() else AS_POSITIONS
