"""SchedulerOutput: a batch for every pass of a step, and whose rows they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dp_runtime.core.batch import Int64, LocalBatch, SamplePositions
from dp_runtime.core.request import PromptEmbeds, TokenLogprob
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.image_slots import ChunkImages, ImageSlots, PlacedImage
from dp_runtime.scheduler.request_state import RequestState
from dp_runtime.scheduler.routed_rows import RoutedRows

PromptLogprobs = Sequence[tuple[TokenLogprob, ...] | Exception]  # of each chunk that scores


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens [start, end) of one prefilling request in a step, as it stood when scheduled."""

    state: RequestState
    start: int
    end: int
    samples: bool  # its last row yields a new token
    score_start: int  # prompt positions [score_start, score_end) get log probabilities
    score_end: int
    token_ids: Int64  # of its rows, and of the position after them if that is known
    embeds: PromptEmbeds | None  # of these positions
    images: ChunkImages

    @classmethod
    def for_budget(
        cls,
        state: RequestState,
        start: int,
        needed: int,
        rows: int,
        budget: int,
        slots: ImageSlots,
    ) -> Chunk | None:
        """Take `rows` of the needed rows, or what the budget leaves beside images among them."""
        images = slots.of_chunk(state.request.images, start, rows, budget)
        if not images.num_rows:
            return None
        end = start + images.num_rows
        scored = state.request.params.prompt_logprobs is not None
        score_start = max(start, state.num_scored)
        last = min(end, state.num_prompt_tokens - 1)
        score_end = max(score_start, last) if scored else score_start
        token_ids = state.tokens(start, min(end + 1, state.num_tokens))
        embeds = _embeds_within(state.request.embeds, start, end + 1)
        samples = needed == images.num_rows
        return cls(state, start, end, samples, score_start, score_end, token_ids, embeds, images)

    @property
    def length(self) -> int:
        return self.end - self.start

    @property
    def num_tokens(self) -> int:
        """Count what it takes of a step's budget: its rows, and images that are encoded first."""
        return self.length + sum(image.image.num_tokens for image in self.images.to_encode)

    @property
    def is_fresh(self) -> bool:
        """Its request begins: nothing of it is computed, or no longer."""
        return self.start == 0

    @property
    def prompt_tokens(self) -> int:
        return max(0, min(self.end, self.state.num_prompt_tokens) - self.start)

    @property
    def scores(self) -> bool:
        return self.score_end > self.score_start


def _embeds_within(embeds: PromptEmbeds | None, start: int, end: int) -> PromptEmbeds | None:
    if embeds is None:
        return None
    inside = (embeds.positions >= start) & (embeds.positions < end)
    return PromptEmbeds(embeds.positions[inside], embeds.values[inside])


class StateCopy(NamedTuple):
    """A recurrent state that goes to another slot, with the inputs of the drafts behind it."""

    source: int
    target: int
    num_accepted: int = 0  # of these drafts, those that whoever goes on from the target has taken


class StateTrack(NamedTuple):
    """A state that a step leaves in a slot for others, if it comes to the end of a page."""

    req_index: int
    copy: StateCopy
    position: int = 0  # where a chunk leaves it; a decode's shows once its drafts are accepted
    num_rows: int = 0  # of the chunk, before the state: left within the pass; 0: copied after it


class StateRestore(NamedTuple):
    page: int  # whose state it is
    copy: StateCopy


@dataclass(frozen=True, eq=False)
class StateMoves:
    """Which recurrent states a step copies, in this order."""

    donated: tuple[StateCopy, ...] = ()  # of requests that have ended
    restored: tuple[StateRestore, ...] = ()  # what requests of the step go on from
    tracks: tuple[StateTrack, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.donated or self.restored or self.tracks)


NO_MOVES = StateMoves()


@dataclass(frozen=True, eq=False, kw_only=True)
class SchedulerOutput:
    batches: tuple[LocalBatch, ...]  # one per pass of the program
    decodes: Int64  # [decodes] their rows in the request table; the target pass's first requests
    chunks: tuple[Chunk, ...]  # its other requests
    req_indices: Int64  # [requests] rows of all of them in the request table
    sampled: Int64  # rows there of those that sample
    samples: SamplePositions  # the target pass's first sample rows, num_drafts + 1 of each decode
    num_drafts: int  # tokens of each decode that the target verifies
    routed: RoutedRows  # the target pass's rows whose experts are returned
    states: StateMoves = NO_MOVES

    @property
    def real_rows(self) -> tuple[int, ...]:
        return tuple(batch.num_tokens for batch in self.batches)

    @property
    def target(self) -> LocalBatch:
        return self.batches[-2 if self.num_drafts else -1]

    @property
    def prefill_rows(self) -> int:
        """Count prompt rows, and tokens of images that are encoded for them."""
        return sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def to_encode(self) -> tuple[PlacedImage, ...]:
        return tuple(image for chunk in self.chunks for image in chunk.images.to_encode)

    @property
    def prefill(self) -> bool:
        return any(chunk.length > 1 for chunk in self.chunks)

    @property
    def unsampled(self) -> tuple[Chunk, ...]:
        """Chunks behind which more of their prompts follows."""
        return tuple(chunk for chunk in self.chunks if not chunk.samples)

    @property
    def unsampled_rows(self) -> Int64:
        """The last rows of these in the target pass."""
        ends = self.target.query_lens.cumsum()[len(self.decodes) :]
        return ends[np.array([not chunk.samples for chunk in self.chunks], np.bool_)] - 1

    def not_finite(self, tokens: SampledTokens) -> Iterator[int]:
        """Yield rows of the table whose requests gave values that are not finite."""
        yield from (int(self.samples.req_indices[row]) for row in tokens.invalid)
        yield from (self.unsampled[index].state.req_index for index in tokens.not_finite)

    @property
    def scored(self) -> tuple[Chunk, ...]:
        """Chunks whose prompt rows follow among the sample rows."""
        return tuple(chunk for chunk in self.chunks if chunk.scores)
