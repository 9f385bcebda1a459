"""Recurrent states behind drafts: what a slot holds, and the accepted drafts of its last pass."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dp_runtime.core.attention_metadata import PageGeometry, Place
from dp_runtime.core.batch import NULL_SLOT
from dp_runtime.core.recurrent_metadata import check_drafts, check_state_slots
from dp_runtime.core.step_program import MAX_DRAFTS, SERVING_PROGRAMS, Program
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from tests.dp_runtime.reference_batches import Part, Passes
from tests.dp_runtime.scheduler.test_speculative_batches import (
    FEWEST_SLOTS,
    MODEL_LEN,
    Driver,
    InflightStep,
    actions,
    request,
)

Written = tuple[int, int]  # request id, position


class DraftedStates(Driver):
    """A device with dirty states, which steps change in the order of their launch.

    A slot has the rows that made its state, and the drafts of its last pass, which are in none.
    """

    def __init__(self, num_pages: int, page_size: int, limits: Limits, depth: int) -> None:
        super().__init__(Scheduler(PageGeometry(num_pages, page_size), limits), depth)
        self.states: list[list[Written]] = [[(-1, -1)] for _ in range(limits.num_state_slots)]
        self.drafts: list[list[Written]] = [[(-1, -1)] * MAX_DRAFTS for _ in self.states]
        self.accepted = [MAX_DRAFTS] * limits.num_state_slots
        self.num_replayed = 0

    def launch(self, step: SchedulerOutput, parts: list[Part], due: Passes) -> InflightStep:
        batch, place = step.target, Place(0, 0, "target")
        check_state_slots(batch, len(self.states), place)
        check_drafts(batch, step.num_drafts, place)
        num_drafts = batch.states.num_drafts.tolist()
        assert num_drafts == [step.num_drafts * part.verified for part in parts]
        slots, fresh = batch.states.slots.tolist(), batch.states.is_fresh.tolist()
        for slot, is_fresh, drafted, part in zip(slots, fresh, num_drafts, parts, strict=True):
            self.run(slot, is_fresh, drafted, part)
        launched = super().launch(step, parts, due)
        verified = len(step.decodes)
        for slot, accepted in zip(slots, launched.accepted[:verified], strict=False):
            self.accepted[slot] = accepted
        for slot in slots[verified:]:
            self.accepted[slot] = 0
        return launched

    def run(self, slot: int, is_fresh: bool, drafted: int, part: Part) -> None:
        """Run the accepted drafts once more and the rows of this pass, of which drafts are kept."""
        number = part.request_id
        rows = [(number, position) for position in part.positions]
        before = [(number, position) for position in range(part.positions.start)]
        state = self.states[slot]
        if is_fresh:
            state = []
        else:
            state = state + self.drafts[slot][: self.accepted[slot]]
            self.num_replayed += self.accepted[slot]
        assert state == before, "the state is not that of the tokens before these rows"
        certain = len(rows) - drafted
        self.states[slot], self.drafts[slot] = state + rows[:certain], rows[certain:]

    def check_slots(self) -> None:
        table = self.scheduler.table
        taken = table.state_slots(np.array(table.req_indices, np.int64)).tolist()
        assert len({*taken}) == len(taken) < len(self.states)
        assert all(NULL_SLOT < slot < len(self.states) for slot in taken)


def limits_of(num_requests: int, spare_tokens: int = 20) -> Limits:
    tokens = num_requests * (1 + MAX_DRAFTS) + spare_tokens
    return Limits(num_requests, tokens, MODEL_LEN, MAX_DRAFTS, True, num_image_slots=FEWEST_SLOTS)


# vllm #53051, #55504, #45100, sglang #24221: counts that are another step's, or another request's.
@settings(deadline=None, max_examples=150)
@given(
    todo=actions, page_size=st.integers(1, 8), spare_pages=st.integers(0, 20),
    num_requests=st.integers(1, 5), spare_tokens=st.integers(0, 20), depth=st.integers(0, 1),
)  # fmt: skip
def test_a_slot_has_the_tokens_of_its_request_whatever_is_accepted(
    todo: list[tuple[str, int, int, int]], page_size: int, spare_pages: int, num_requests: int,
    spare_tokens: int, depth: int,
) -> None:  # fmt: skip
    num_pages = 1 + -(-(MODEL_LEN + MAX_DRAFTS) // page_size) + spare_pages
    driver = DraftedStates(num_pages, page_size, limits_of(num_requests, spare_tokens), depth)
    count = 0
    for name, first, second, third in todo:
        if name == "add":
            driver.add(request(count, first, second, third, scores=count % 2 == 0))
            count += 1
        elif name == "step":
            driver.step(first)
        elif first < count:
            driver.abort(first)
        driver.check_slots()
    while driver.scheduler.has_work:
        driver.step(1 + count % MAX_DRAFTS)
    assert not driver.scheduler.table.req_indices, "a slot is not given back"
    assert driver.finished == {*range(count)}


def test_accepted_drafts_are_run_again_and_prompts_of_any_length_are_no_verifications() -> None:
    driver = DraftedStates(80, 4, limits_of(5), depth=1)
    for number in range(MAX_DRAFTS + 4):
        driver.add(request(2 * number, 1 + number, 15, 0, scores=False))
    while driver.scheduler.has_work:
        driver.step(3)
    assert driver.num_replayed > 20


def test_without_drafts_or_states_a_batch_has_no_numbers_of_drafts() -> None:
    plain = Limits(4, 40, MODEL_LEN, MAX_DRAFTS, num_image_slots=FEWEST_SLOTS)
    for limits, program in (
        (plain, Program.speculative(2)), (limits_of(4), SERVING_PROGRAMS[0]),
    ):  # fmt: skip
        scheduler = Scheduler(PageGeometry(40, 4), limits)
        scheduler.add(request(2, 5, 9, 0, scores=False))
        assert not len(scheduler.schedule(program).target.states.num_drafts)
