"""What the rows of a step with drafts have to be, by the known tokens, in plain lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.request import RankRequest
from dp_runtime.core.step_program import Pass, Program
from dp_runtime.scheduler.scheduler_output import SchedulerOutput


class Feature(NamedTuple):
    """Which of an image's features."""

    digest: bytes
    token: int  # of the image


class Row(NamedTuple):
    """One row of a pass: its token, or the index of the pending token it will be, and where."""

    request_id: int
    position: int
    token: int | None
    pending: int | None
    slot: int
    rope: tuple[int, int, int]
    embeds: tuple[float, ...] | None = None
    feature: Feature | None = None


class Part(NamedTuple):
    """The rows of one request in the target pass."""

    request_id: int
    positions: range
    verified: bool
    samples: bool
    scores: range  # prompt positions


@dataclass(frozen=True)
class Passes:
    """What the passes of a step have to be: rows, sample rows, samples."""

    rows: tuple[list[Row], ...]
    sample_rows: tuple[list[int], ...]
    samples: list[tuple[int, int]]


class ReferenceBatches:
    """What one scheduler's requests have known, told step by step; plain lists throughout."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.requests: dict[int, RankRequest] = {}
        self.known: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.scored: dict[int, int] = {}

    def add(self, request: RankRequest) -> None:
        self.requests[request.request_id] = request
        self.known[request.request_id] = list(request.prompt_token_ids)
        self.computed[request.request_id] = self.scored[request.request_id] = 0

    def parts(self, step: SchedulerOutput, program: Program, ids: list[int]) -> list[Part]:
        """The requests `ids` of a step, by the scheduler's choice; how far, by what is known."""
        target = step.batches[program.passes.index(Pass.TARGET)]
        ends = target.seq_lens.tolist()
        parts = []
        for number, (request_id, end) in enumerate(zip(ids, ends)):
            known, prompt = len(self.known[request_id]), self.prompt_len(request_id)
            if number < len(step.decodes):
                due = range(known - 1, known + program.num_drafts)
                assert known > prompt, "a prompt has to be sampled from first"
                parts.append(Part(request_id, due, True, True, range(0)))
                continue
            start = end - int(target.query_lens[number])
            assert start in (0, self.computed[request_id]), "from the start if it was preempted"
            self.computed[request_id] = end
            asks = self.requests[request_id].params.prompt_logprobs is not None
            first = max(start, self.scored[request_id])
            scores = range(first, max(first, min(end, prompt - 1)) if asks else first)
            self.scored[request_id] = max(self.scored[request_id], scores.stop)
            parts.append(Part(request_id, range(start, end), False, end == known, scores))
        return parts

    def passes(self, parts: list[Part], program: Program, pages: dict[int, list[int]]) -> Passes:
        verified = [part for part in parts if part.verified]
        drafts = [
            list(self.draft_rows(verified, index, pages))
            for index in range(program.passes.count(Pass.DRAFT))
        ]
        target: list[Any] = []
        extend: list[Any] = []
        ends: list[Any] = []
        samples, firsts = [], []
        scores: list[int] = []
        for number, part in enumerate(parts):
            first = len(target)
            samples += self.samples_of(part)
            target += self.target_rows(part, number * (1 + program.num_drafts), pages)
            extend += self.extend_rows(part, len(samples), pages)
            ends += range(first, len(target)) if part.verified else [len(target) - 1] * part.samples
            firsts.append(first if part.verified else len(target) - 1)
            scores += [first + position - part.positions.start for position in part.scores]
        each = [list(range(len(verified)))] * len(drafts)
        return Passes((*drafts, target, extend), (*each, ends + scores, firsts), samples)

    def draft_rows(
        self, verified: list[Part], index: int, pages: dict[int, list[int]]
    ) -> Iterator[Row]:
        """The draft of the pass before it, of every verified request."""
        for number, part in enumerate(verified):
            yield self.row(part.request_id, part.positions[index], None, number, pages)

    def target_rows(self, part: Part, chain: int, pages: dict[int, list[int]]) -> Iterator[Row]:
        """Known tokens; of a verification the request's chain, which begins with the last one.

        chain: its number among the pending tokens.
        """
        known = self.known[part.request_id]
        for position in part.positions:
            token = None if part.verified else known[position]
            pending = chain + position - part.positions.start if part.verified else None
            at = part.request_id, position
            yield self.row(*at, token, pending, pages, position)

    def extend_rows(self, part: Part, end: int, pages: dict[int, list[int]]) -> Iterator[Row]:
        """The same positions, each with the token behind it; samples end with number `end`."""
        known = self.known[part.request_id]
        for position in part.positions:
            token = known[position + 1] if position + 1 < len(known) else None
            pending = None if token is not None else end - (part.positions.stop - position)
            at = part.request_id, position
            yield self.row(*at, token, pending, pages, position + 1)

    def samples_of(self, part: Part) -> list[tuple[int, int]]:
        """Output indices: a verification has one for each of its rows."""
        done = len(self.known[part.request_id]) - self.prompt_len(part.request_id)
        count = len(part.positions) if part.verified else int(part.samples)
        return [(part.request_id, done + index) for index in range(count)]

    def row(
        self, request_id: int, position: int, token: int | None, pending: int | None,
        pages: dict[int, list[int]], read: int | None = None,
    ) -> Row:  # fmt: skip
        """read: the position for whose token something else may stand; None: of a draft."""
        page = pages[request_id][position // self.page_size]
        slot = page * self.page_size + position % self.page_size
        at = request_id, position, token, pending, slot
        embeds = self.embeds(request_id).get(read) if read is not None else None
        feature = self.features(request_id).get(read) if read is not None else None
        return Row(*at, self.rope(request_id, position), embeds, feature)

    def features(self, request_id: int) -> dict[int, Feature]:
        return {
            image.start + index: Feature(image.digest, index)
            for image in self.requests[request_id].images
            for index in range(image.num_tokens)
        }

    def rope(self, request_id: int, position: int) -> tuple[int, int, int]:
        """Count a text on; an image's tokens have one time, and what follows its longer side."""
        lag = 0
        for image in self.requests[request_id].images:
            if position < image.start:
                break
            if position < image.end:
                row, column = divmod(position - image.start, image.columns)
                first = image.start - lag
                return first, first + row, first + column
            lag += image.num_tokens - max(image.rows, image.columns)
        return (position - lag,) * 3

    def embeds(self, request_id: int) -> dict[int, tuple[float, ...]]:
        embeds = self.requests[request_id].embeds
        if embeds is None:
            return {}
        return dict(zip(embeds.positions.tolist(), map(tuple, embeds.values.tolist())))

    def prompt_len(self, request_id: int) -> int:
        return len(self.requests[request_id].prompt_token_ids)


def rows_of(
    batch: LocalBatch, request_ids: list[int], pool: dict[int, Feature] | None = None
) -> list[Row]:
    """What a batch of these requests says, in the reference's words; pool: features by slot."""
    owners = np.repeat(request_ids, batch.query_lens).tolist()
    embeds = dict(zip(batch.embeds.rows.tolist(), map(tuple, batch.embeds.values.tolist())))
    features = {
        row: (pool or {})[slot] for row, slot in zip(batch.images.rows.tolist(),
                                                     batch.images.values.tolist())
    }  # fmt: skip
    rope = np.broadcast_to(batch.rotary_positions, (3, batch.num_tokens)).T.tolist()
    columns = zip(
        owners, batch.positions.tolist(), batch.token_ids.tolist(), 
        batch.future_token_index.tolist(),
        batch.slot_mapping.tolist(), strict=True,
    )  # fmt: skip
    return [
        Row(owner, position, None if source >= 0 else token, source if source >= 0 else None, slot,
            tuple(rope[number]), embeds.get(number), features.get(number))
        for number, (owner, position, token, source, slot) in enumerate(columns)
    ]  # fmt: skip
