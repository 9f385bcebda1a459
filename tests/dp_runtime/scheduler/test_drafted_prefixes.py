"""Shared pages under speculation: accepted tokens alone enter, and hits are those of a model."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.step_program import MAX_DRAFTS, Program
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from tests.dp_runtime.reference_scheduler import Rows
from tests.dp_runtime.scheduler.test_scheduler import MODEL_LEN
from tests.dp_runtime.scheduler.test_shared_prefixes import (
    PAGE,
    SharingDriver,
    actions,
    play,
    prompt_of,
    request,
)
from tests.dp_runtime.scheduler.test_speculative_batches import accepted_of

WRONG = 999  # what stands behind the accepted drafts
FEWEST_TOKENS = 6 * (1 + MAX_DRAFTS)
FEWEST_PAGES = 1 + -(-(MODEL_LEN + MAX_DRAFTS) // PAGE)


@dataclass(frozen=True)
class Given:
    """What the device gives of a step that is in flight."""

    tokens: tuple[int, ...]
    accepted: tuple[int, ...]
    rejected: dict[int, int]  # drafts, by request


class DraftingDriver(SharingDriver):
    """A device that verifies drafts, with the pages of a target and of its draft model.

    What a draft model keeps of a position depends on the next token too. Rows of rejected drafts
    are written, and are nobody's content.
    """

    def __init__(self, num_pages: int, tokens: int, depth: int, **fields: Any) -> None:
        super().__init__(num_pages, tokens, depth, max_drafts=MAX_DRAFTS, **fields)
        self.given: deque[Given] = deque()
        self.use(MAX_DRAFTS)

    def use(self, num_drafts: int) -> None:
        """Draft so many tokens in the next steps."""
        self.program = Program.speculative(num_drafts)

    def due_rows(self, scheduled: SchedulerOutput, prefill_budget: int | None) -> Rows:
        return self.reference.schedule(prefill_budget, self.program.num_drafts)

    def check_batch(self, scheduled: SchedulerOutput, rows: Rows) -> None:
        bounds, num_drafts = scheduled.target, scheduled.num_drafts
        numbers = self.scheduler.table.request_ids[scheduled.req_indices].tolist()
        starts = (bounds.seq_lens - bounds.query_lens).tolist()
        assert list(zip(numbers, starts, bounds.seq_lens.tolist(), strict=True)) == rows
        self.poison()
        lags = self.given[-1].rejected if self.given else {}
        behind = np.array([lags.get(number, 0) for number in numbers], np.int64)
        batch = bounds.rewound(behind, PAGE)
        tokens, accepted = list[int](), list[int]()
        for index, (number, bound, end) in enumerate(rows):
            start, rejected = bound - int(behind[index]), 0
            if verifies := index < len(scheduled.decodes):
                accepted.append(accepted_of(number, start, num_drafts))
                rejected = num_drafts - accepted[-1]
            self.run(batch.page_table[index], number, start, start + end - bound, rejected)
            right = start + end - bound - rejected
            if verifies or scheduled.chunks[index - len(scheduled.decodes)].samples:
                first = start if verifies else right - 1
                tokens += [self.token_at(number, at + 1) for at in range(first, right)]
                tokens += [WRONG] * rejected
        if rows:
            lost = [num_drafts - count for count in accepted]
            given = Given(tuple(tokens), tuple(accepted), dict(zip(numbers, lost, strict=False)))
            self.given.append(given)
        for chunk in scheduled.scored:
            self.scored[chunk.state.request_id] = chunk.score_end

    def run(self, pages: np.ndarray, number: int, start: int, end: int, rejected: int) -> None:
        """Write rows [start, end), the last of which are rejected drafts, and read all others."""
        places = [int(pages[at // PAGE]) * PAGE + at % PAGE for at in range(end)]
        for at in range(start, end - rejected):
            self.slots[places[at]] = self.content(number, at)
        for at in range(end - rejected, end):
            self.slots[places[at]] = "rejected", (number, at)
        for at in range(end - rejected):
            found = self.slots[places[at]]
            assert found == self.content(number, at), f"{number} reads another's token at {at}"

    def commit(self, scheduled: SchedulerOutput, rows: Rows) -> None:
        given = self.given.popleft()
        tokens = SampledTokens(given.tokens, (None,) * len(given.tokens), given.accepted)
        for item in self.scheduler.commit(scheduled, tokens, [() for _ in scheduled.scored]):
            assert item.request_id not in self.reasons, "a finished request made progress"
            self.outputs[item.request_id] += item.token_ids
            if item.finish_reason:
                self.reasons[item.request_id] = item.finish_reason
        ended = [number for number, _, _ in rows if number in self.reasons]
        self.reference.commit(rows, ended, given.rejected)

    def abandon(self) -> None:
        self.given.clear()
        super().abandon()


@settings(deadline=None, max_examples=60)
@given(
    actions, st.lists(st.integers(1, MAX_DRAFTS), min_size=1, max_size=5),
    st.integers(FEWEST_PAGES, 40), st.integers(FEWEST_TOKENS, FEWEST_TOKENS + 20),
    st.integers(0, 1), st.sampled_from([1, 7, 99]),
)  # fmt: skip
def test_accepted_tokens_alone_are_shared_as_a_plain_model_says(
    todo: list[tuple[str, Any, int, int]], drafts: list[int], num_pages: int, tokens: int,
    depth: int, awaited: int,
) -> None:  # fmt: skip
    driver = DraftingDriver(num_pages, tokens, depth, min_awaited_tokens=awaited)
    for number, action in enumerate(todo):
        driver.use(drafts[number % len(drafts)])
        play(driver, [action])
    driver.drain()
    assert driver.scheduler.num_free_pages == num_pages - 1
    driver.check_outputs()


@pytest.mark.parametrize("depth", [0, 1])
def test_drafts_behind_the_end_of_a_request_are_in_no_page(depth: int) -> None:
    """Each ends within a verification: its rows go on for up to two pages more."""
    driver = DraftingDriver(60, FEWEST_TOKENS, depth)
    for number in range(2 * PAGE):
        driver.add(request(1000 + number, (number, *prompt_of(0, 8)), 2 + number))
    driver.drain()
    driver.check_outputs()


@pytest.mark.parametrize("depth", [0, 1])
def test_the_next_turn_finds_accepted_tokens(depth: int) -> None:
    driver = DraftingDriver(40, FEWEST_TOKENS, depth)
    driver.add(request(2, prompt_of(0, 9), 8))
    driver.drain()
    text = (*prompt_of(0, 9), *driver.outputs[2])
    driver.add(request(3, (*text, 300, 301), 3))
    driver.drain()
    assert driver.scheduler.prefixes is not None
    assert driver.scheduler.prefixes.num_hits == 16
