"""The batches of every pass of programs with drafts, row by row against a plain reference."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import PageGeometry, Place, check_values
from dp_runtime.core.batch import Int64, LocalBatch
from dp_runtime.core.request import PromptEmbeds, PromptImage, RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import MAX_DRAFTS, Pass, Program
from dp_runtime.sampling.rng import derive_seed
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from tests.dp_runtime.prompt_images import prompt_image
from tests.dp_runtime.reference_batches import Feature, Part, Passes, ReferenceBatches, rows_of
from tests.dp_runtime.scheduler.routed_positions import RoutedPositions

MODEL_LEN = 40
HIDDEN = 3
IMAGES = 4  # instead of embeddings, which are at every first, second or third position
SHAPES = ((1, 1), (2, 3), (1, 4), (3, 1))  # rows and columns of images
FEWEST_SLOTS = 2 * max(rows * columns for rows, columns in SHAPES)


def text_token(request_id: int, index: int) -> int:
    """The model of these tests: output number `index`."""
    return derive_seed(request_id, index) % 200


def accepted_of(request_id: int, num_known: int, num_drafts: int) -> int:
    return derive_seed(request_id + 1000, num_known) % (num_drafts + 1)


@dataclass(frozen=True)
class InflightStep:
    """A step that is not committed, and what it will give."""

    scheduled: SchedulerOutput
    tokens: tuple[int, ...]
    accepted: tuple[int, ...]
    lags: dict[int, int]  # of its requests: tokens that each is behind its bounds
    positions: Int64  # of the target's rows


class Driver:
    """Plays the steps of a scheduler without a model, and checks every batch of each.

    The reference knows at once what a launched step gives; the scheduler, when it is committed.
    """

    def __init__(self, scheduler: Scheduler, depth: int = 0) -> None:
        self.scheduler = scheduler
        self.reference = ReferenceBatches(scheduler.pages.page_size)
        self.depth = depth
        self.in_flight: deque[InflightStep] = deque()
        self.outputs: dict[int, list[int]] = {}
        self.finished: set[int] = set()
        self.routed = RoutedPositions()
        self.pool: dict[int, Feature] = {}  # by slot

    def add(self, request: RankRequest) -> None:
        self.scheduler.add(request)
        self.reference.add(request)
        self.outputs[request.request_id] = []

    def abort(self, request_id: int) -> None:
        if self.scheduler.abort(request_id):
            self.finished.add(request_id)

    def step(self, num_drafts: int) -> SchedulerOutput:
        program = Program.speculative(num_drafts)
        step = self.scheduler.schedule(program)
        self.scheduler.check()
        table = self.scheduler.table
        parts = self.reference.parts(step, program, table.request_ids[step.req_indices].tolist())
        pages = {
            int(table.request_ids[row]): self.scheduler.page_table.pages(row)
            for row in step.req_indices.tolist()
        }
        due = self.reference.passes(parts, program, pages)
        for image, slots in ((one.image, one.slots.tolist()) for one in step.to_encode):
            assert len(slots) == image.num_tokens
            self.pool |= {slot: Feature(image.digest, n) for n, slot in enumerate(slots)}
        self.check(step, program, parts, due)
        if parts:
            self.in_flight.append(self.launch(step, parts, due))
        while len(self.in_flight) > (self.depth if parts else 0):
            self.commit(self.in_flight.popleft())
        self.scheduler.check()
        return step

    def check(
        self, step: SchedulerOutput, program: Program, parts: list[Part], due: Passes
    ) -> None:
        assert len(step.batches) == len(program.passes)
        lags = self.in_flight[-1].lags if self.in_flight else {}
        request_ids = self.scheduler.table.request_ids[step.req_indices].tolist()
        for pass_kind, bounds, rows, sample_rows in zip(
            program.passes, step.batches, due.rows, due.sample_rows, strict=True
        ):
            check_values(bounds, self.scheduler.pages, Place(0, 0, pass_kind))
            ids = request_ids[: bounds.num_requests]  # those of a draft pass come first
            assert bounds.lengths_are_bounds.tolist() == [one in lags for one in ids]
            behind = np.array([lags.get(one, 0) for one in ids], np.int64)
            batch = bounds.rewound(behind, self.scheduler.pages.page_size)
            assert rows_of(batch, ids, self.pool) == rows, pass_kind
            assert batch.sample_rows.tolist() == sample_rows, pass_kind
            starts = batch.seq_lens - batch.query_lens
            assert starts.tolist() == batch.positions[first_rows(batch)].tolist(), pass_kind
        sampled_ids = self.scheduler.table.request_ids[step.samples.req_indices].tolist()
        found = zip(sampled_ids, step.samples.output_indices.tolist())
        assert list(found) == [(one, index + lags.get(one, 0)) for one, index in due.samples]
        sampled = [part.request_id for part in parts if part.samples]
        assert self.scheduler.table.request_ids[step.sampled].tolist() == sampled
        self.check_counts(step, program)

    def check_counts(self, step: SchedulerOutput, program: Program) -> None:
        """Rows are counted by who decodes and by the chunks, whatever will be accepted."""
        rows = len(step.decodes) * (1 + program.num_drafts) + sum(c.length for c in step.chunks)
        drafts = [len(step.decodes)] * program.passes.count(Pass.DRAFT)
        assert step.real_rows == (*drafts, rows, rows)
        assert rows <= self.scheduler.limits.max_num_tokens

    def launch(self, step: SchedulerOutput, parts: list[Part], due: Passes) -> InflightStep:
        """Tell the reference what the step gives each request, be it at its end or not."""
        accepted, lags = [], {}
        for part in parts:
            known = self.reference.known[part.request_id]
            count = int(part.samples)
            if part.verified:
                accepted.append(accepted_of(part.request_id, len(known), step.num_drafts))
                count += accepted[-1]
            lags[part.request_id] = step.num_drafts - accepted[-1] if part.verified else 0
            done = len(known) - self.reference.prompt_len(part.request_id)
            known += [text_token(part.request_id, done + index) for index in range(count)]
            if part.verified:
                self.reference.computed[part.request_id] = len(known) - 1
        tokens = tuple(text_token(*sample) for sample in due.samples)
        positions = np.array([row.position for row in due.rows[-2]], np.int64)
        return InflightStep(step, tokens, tuple(accepted), lags, positions)

    def commit(self, step: InflightStep) -> None:
        given = SampledTokens(step.tokens, (None,) * len(step.tokens), step.accepted)
        scores = [() for _ in step.scheduled.scored]
        progress = self.scheduler.commit(step.scheduled, given, scores)
        for item in self.routed.told(step.scheduled, step.positions, progress):
            outputs = self.outputs[item.request_id]
            done = len(outputs)
            assert item.request_id not in self.finished
            assert item.first_index == done
            new = [text_token(item.request_id, done + n) for n in range(len(item.token_ids))]
            assert list(item.token_ids) == new
            ends = self.reference.requests[item.request_id].stop_token_ids
            assert not ends.intersection(new[:-1]), "nothing comes behind the end"
            outputs += new
            self.routed.check(self.reference.requests[item.request_id], outputs)
            if item.finish_reason:
                self.finished.add(item.request_id)


def first_rows(batch: LocalBatch) -> np.ndarray:
    return batch.query_lens.cumsum() - batch.query_lens


def request(number: int, prompt: int, outputs: int, embed_every: int, scores: bool) -> RankRequest:
    logprobs, routed = 1 if scores else None, number % 3 > 0
    params = SamplingParams(
        max_tokens=outputs, prompt_logprobs=logprobs, return_routed_experts=routed
    )
    positions = np.arange(0, prompt, embed_every) if 0 < embed_every < IMAGES else None
    embeds = None
    if positions is not None:
        values = (positions[:, None] + number * 100 + np.arange(HIDDEN) / 8).astype(np.float32)
        embeds = PromptEmbeds(positions, values)
    stops = {text_token(number, 3 + number)} if number % 2 else set()
    ids = tuple(number + 3 * index for index in range(1, prompt + 1))
    images = some_images(prompt, number) if embed_every == IMAGES else ()
    return RankRequest(number, ids, params, 0, frozenset(stops), embeds, images)


def some_images(prompt: int, number: int) -> tuple[PromptImage, ...]:
    """Images all over a prompt, some without a token between; other prompts have some of them."""
    images, at = list[PromptImage](), number % 3
    for index in range(10):
        rows, columns = SHAPES[(number // 2 + index) % len(SHAPES)]
        image = prompt_image(rows, columns, at)
        if image.end > prompt:
            break
        images.append(image)
        at = image.end + (number + index) % 3
    return tuple(images)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 30), st.integers(1, 20), st.integers(0, 4)),
        st.tuples(st.just("step"), st.integers(1, MAX_DRAFTS), st.just(0), st.just(0)),
        st.tuples(st.just("step"), st.integers(1, MAX_DRAFTS), st.just(0), st.just(0)),
        st.tuples(st.just("abort"), st.integers(0, 10), st.just(0), st.just(0)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(
    todo=actions, page_size=st.integers(1, 8), spare_pages=st.integers(0, 20),
    num_requests=st.integers(1, 5), spare_tokens=st.integers(0, 20), depth=st.integers(0, 1),
)  # fmt: skip
def test_every_slot_is_what_the_known_tokens_say(
    todo: list[tuple[str, int, int, int]], page_size: int, spare_pages: int, num_requests: int,
    spare_tokens: int, depth: int,
) -> None:  # fmt: skip
    num_pages = 1 + -(-(MODEL_LEN + MAX_DRAFTS) // page_size) + spare_pages
    limits = Limits(
        num_requests, num_requests * (1 + MAX_DRAFTS) + spare_tokens, MODEL_LEN, MAX_DRAFTS,
        num_image_slots=FEWEST_SLOTS + spare_tokens,
    )  # fmt: skip
    driver = Driver(Scheduler(PageGeometry(num_pages, page_size), limits), depth)
    count = 0
    for name, first, second, third in todo:
        if name == "add":
            driver.add(request(count, first, second, third, scores=count % 2 == 0))
            count += 1
        elif name == "abort" and first < count:
            driver.abort(first)
        elif name == "step":
            driver.step(first)
    while driver.scheduler.has_work:
        driver.step(3)
    assert driver.finished == {*range(count)}
    assert driver.scheduler.num_free_pages == num_pages - 1


def test_a_verification_beside_a_chunk() -> None:
    """One request has 4 known tokens, the other a prompt of 9, of which 5 fit: in numbers."""
    driver = Driver(Scheduler(PageGeometry(12, 4), Limits(2, 8, MODEL_LEN, 2)))
    driver.add(request(1, 3, 20, 0, scores=False))
    driver.step(2)
    driver.add(request(2, 9, 20, 0, scores=True))
    draft, target, extend = driver.step(2).batches
    assert (draft.positions.tolist(), draft.seq_lens.tolist()) == ([3], [4])
    assert draft.future_token_index.tolist() == [0]
    assert target.positions.tolist() == extend.positions.tolist() == [3, 4, 5, 0, 1, 2, 3, 4]
    assert target.token_ids.tolist() == [0, 0, 0, 5, 8, 11, 14, 17]
    assert target.future_token_index.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert target.sample_rows.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert extend.token_ids.tolist() == [0, 0, 0, 8, 11, 14, 17, 20]
    assert extend.future_token_index.tolist() == [0, 1, 2, -1, -1, -1, -1, -1]
    assert extend.sample_rows.tolist() == [0, 7]
