"""A device whose pages and states remember the tokens that made them, under a real scheduler."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dp_runtime.core.attention_metadata import PageGeometry, Place
from dp_runtime.core.recurrent_metadata import check_drafts, check_state_slots, check_tracks
from dp_runtime.core.request import FinishReason, RankRequest
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import MAX_DRAFTS, SERVING_PROGRAMS, Program
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.sampling.rng import derive_seed
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.abandonment import abandon_steps
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.request_state import RequestStatus
from dp_runtime.scheduler.scheduler import Scheduler
from dp_runtime.scheduler.scheduler_output import SchedulerOutput, StateCopy

POISON = -1
STOP = 7
WRONG = 999  # a draft that is not what comes next


def after(state: int, tokens: Sequence[int]) -> int:
    """The state of a sequence that goes on; 0 is that of none, and poison stays poison."""
    for token in tokens:
        state = POISON if state == POISON else derive_seed(state, token) + 1
    return state


@dataclass(eq=False)
class Slot:
    """The state before the drafts of its last pass, and these."""

    state: int = POISON
    drafts: tuple[int, ...] = (WRONG,) * MAX_DRAFTS

    def at(self, num_accepted: int) -> int:
        assert num_accepted <= len(self.drafts), f"{num_accepted} of {len(self.drafts)} drafts"
        return after(self.state, self.drafts[:num_accepted])


@dataclass(frozen=True)
class InFlight:
    scheduled: SchedulerOutput
    sampled: tuple[int, ...]
    accepted: tuple[int, ...]


@dataclass(eq=False)
class Text:
    request: RankRequest
    tokens: list[int]  # that the device knows
    outputs: list[int] = field(default_factory=list)  # that the host does
    reason: FinishReason | None = None
    states: list[int] = field(default_factory=lambda: [0])  # after so many tokens

    def state_at(self, num_tokens: int) -> int:
        while len(self.states) <= num_tokens:
            self.states.append(after(self.states[-1], [self.tokens[len(self.states) - 1]]))
        return self.states[num_tokens]


class StateDevice:
    """Runs steps as they are launched, and commits them one behind at depth 1.

    Every row must find the state and the pages of the tokens before it.
    """

    def __init__(self, num_pages: int, limits: Limits, page_size: int, depth: int = 0) -> None:
        hasher = PageHasher(page_size, "a model", covers_next=limits.max_drafts > 0)
        self.scheduler = Scheduler(PageGeometry(num_pages, page_size), limits, (), hasher)
        self.page_size, self.depth, self.limits = page_size, depth, limits
        self.slots = [Slot() for _ in range(limits.num_state_slots)]
        self.accepted = [MAX_DRAFTS] * limits.num_state_slots
        self.kv: dict[int, int] = {}
        self.following: dict[int, int] = {}  # the token after each slot's, where a page has it too
        self.sequences: dict[int, Text] = {}
        self.in_flight: deque[InFlight] = deque()
        self.hits: dict[int, list[int]] = {}  # by request, each time that it began
        self.num_copies = self.num_restored = self.num_passed = 0

    def add(self, prompt: Sequence[int], num_outputs: int, stops: bool = False) -> int:
        number, ends = len(self.sequences), frozenset({STOP} if stops else ())
        params = SamplingParams(max_tokens=num_outputs)
        request = RankRequest(number, tuple(prompt), params, 0, ends)
        self.sequences[number] = Text(request, [*prompt])
        self.hits[number] = []
        self.scheduler.add(request)
        return number

    def step(self, num_drafts: int = 0, budget: int | None = None) -> SchedulerOutput:
        program = Program.speculative(num_drafts) if num_drafts else SERVING_PROGRAMS[0]
        due, evictions = self.hits_due(), self.num_evictions
        scheduled = self.scheduler.schedule(program, budget)
        self.check_hits(scheduled, due, exactly=evictions == self.num_evictions)
        self.scheduler.check()
        if scheduled.target.num_requests:
            self.in_flight.append(self.run(scheduled))
        while len(self.in_flight) > (self.depth if scheduled.target.num_requests else 0):
            self.commit(self.in_flight.popleft())
        self.check()
        return scheduled

    def drain(self, num_drafts: int = 0) -> None:
        steps = 0
        while self.scheduler.has_work:
            self.step(num_drafts)
            steps += 1
            assert steps < 5000, "the scheduler starves somebody"

    def abort(self, number: int) -> None:
        if self.scheduler.abort(number):
            self.sequences[number].reason = FinishReason.ABORT
        self.check()

    def abandon(self) -> None:
        """End an epoch: launched steps have run, but nobody hears of them."""
        self.in_flight.clear()
        self.accepted = [0] * len(self.accepted)
        abandon_steps(self.scheduler)
        for one in self.sequences.values():
            one.tokens = [*one.request.prompt_token_ids, *one.outputs]
            del one.states[len(one.tokens) + 1 :]
        for number in self.running():
            self.hits[number].append(self.num_computed(number))
        self.check()

    @property
    def num_evictions(self) -> int:
        allocator = self.scheduler.page_table.allocator
        return allocator.num_evictions + allocator.cache.states.num_evictions

    def running(self) -> list[int]:
        ids: list[int] = self.scheduler.table.request_ids[self.scheduler.running].tolist()
        return ids

    def num_computed(self, number: int) -> int:
        state = self.scheduler.requests.get(number)
        assert state is not None
        return int(self.scheduler.table.num_computed_tokens[state.req_index])

    def run(self, step: SchedulerOutput) -> InFlight:
        """Copy states, run the target's rows, and copy states."""
        self.copy(step.states.donated)
        self.copy([restore.copy for restore in step.states.restored])
        self.num_restored += len(step.states.restored)
        batch, place = step.target, Place(0, 0, "target")
        check_state_slots(batch, len(self.slots), place)
        check_drafts(batch, step.num_drafts, place)
        check_tracks(batch, len(self.slots), place)
        sampled, accepted = list[int](), list[int]()
        numbers = self.scheduler.table.request_ids[step.req_indices].tolist()
        for index, number in enumerate(numbers):
            chunk = None if index < len(step.decodes) else step.chunks[index - len(step.decodes)]
            drafts = step.num_drafts if chunk is None else 0
            known = self.sequences[number].tokens
            start = len(known) - 1 if chunk is None else chunk.start
            count = derive_seed(number, len(known)) % (drafts + 1) if drafts else 0
            follows = [self.next_token(number, ahead) for ahead in range(count + 1)]
            fed = [known[-1], *follows[:count]] if chunk is None else known[start : chunk.end]
            fed += [WRONG] * (drafts - count if chunk is None else 0)
            assert len(fed) == batch.query_lens[index]
            self.run_rows(batch, index, number, start, fed, drafts, count)
            if chunk is None or chunk.samples:
                self.sequences[number].tokens += follows
                sampled += follows + [WRONG] * (drafts - count)
            if self.limits.max_drafts:
                for at in range(start, start + len(fed) - drafts + count):
                    following = self.sequences[number].tokens[at + 1]
                    self.following[self.place(batch.page_table[index], at)] = following
            if chunk is None:
                accepted.append(count)
        tracks = [track for track in step.states.tracks if not track.num_rows]
        self.copy([track.copy for track in tracks])
        self.num_copies += len(step.states.tracks)
        return InFlight(step, tuple(sampled), tuple(accepted) if step.num_drafts else ())

    def next_token(self, number: int, ahead: int) -> int:
        """The model of these tests: what follows depends on all tokens before it."""
        tokens = list(self.sequences[number].tokens)
        for _ in range(ahead + 1):
            tokens.append(after(0, tokens[-8:]) % 60 + 1)
        return tokens[-1]

    def run_rows(
        self,
        batch: Any,
        index: int,
        number: int,
        start: int,
        fed: list[int],
        drafts: int,
        count: int,
    ) -> None:
        slot, pages = self.slots[batch.states.slots[index]], batch.page_table[index]
        text, state = self.sequences[number], 0
        if not batch.states.is_fresh[index]:
            state = slot.at(self.accepted[batch.states.slots[index]])
        assert batch.states.is_fresh[index] == (start == 0)
        value = text.state_at(start)
        assert state == value, "the state is not that of the tokens before these rows"
        for at in range(start):
            assert self.kv[self.place(pages, at)] == text.states[at + 1], "a page is another's"
        for at, token in enumerate(fed, start):
            value = after(value, [token])
            self.kv[self.place(pages, at)] = value
        certain = len(fed) - drafts
        slot.state, slot.drafts = after(state, fed[:certain]), tuple(fed[certain:])
        self.accepted[batch.states.slots[index]] = count
        if len(batch.states.track_slots) and batch.states.track_slots[index]:
            track = self.slots[batch.states.track_slots[index]]
            track.state, track.drafts = after(state, fed[: batch.states.track_rows[index]]), ()

    def place(self, pages: np.ndarray, at: int) -> int:
        return int(pages[at // self.page_size]) * self.page_size + at % self.page_size

    def copy(self, copies: Sequence[StateCopy]) -> None:
        targets = [each.target for each in copies]
        assert len({*targets}) == len(targets)
        assert not {*targets} & {each.source for each in copies}
        for each in copies:
            source, target = self.slots[each.source], self.slots[each.target]
            target.state, target.drafts = source.state, source.drafts
            self.accepted[each.target] = each.num_accepted

    def commit(self, step: InFlight) -> None:
        tokens = SampledTokens(step.sampled, (None,) * len(step.sampled), step.accepted)
        for item in self.scheduler.commit(step.scheduled, tokens):
            one = self.sequences[item.request_id]
            assert one.reason is None
            one.outputs += item.token_ids
            one.reason = item.finish_reason
            text = one.tokens[len(one.request.prompt_token_ids) :]
            assert one.outputs == text[: len(one.outputs)]

    def ends(self) -> tuple[set[tuple[int, int]], set[int]]:
        """What the device holds at the ends of cached pages: in these, and in states there.

        With drafts pages are told apart by the token after them, too.
        """
        cache, size = self.scheduler.page_table.allocator.cache, self.page_size
        pages = [page for page in range(self.scheduler.pages.num_pages) if page in cache]
        in_pages = {page: self.kv[page * size + size - 1] for page in pages}
        kept, states = set[int](), self.scheduler.states
        for page in cache.states.pages:
            checkpoint = cache.states.find(page)
            copy = states.donated.get(checkpoint.slot)  # by the next step
            slot = self.slots[copy.source if copy else checkpoint.slot]
            state = slot.at(checkpoint.num_accepted)
            assert state == in_pages[page], "the state behind a page is not that of its tokens"
            self.num_passed += checkpoint.num_accepted > 0
            kept.add(state)
        after = {page: self.following.get(page * size + size - 1, 0) for page in pages}
        return {(in_pages[page], after[page]) for page in pages}, kept

    def hits_due(self) -> dict[int, int]:
        """The tokens that each waiting request would find, by what the device holds."""
        in_pages, kept = self.ends()
        due = {}
        for waiting in self.scheduler.waiting:
            text = self.sequences[waiting.request_id]
            due[waiting.request_id] = 0
            for at in range(self.page_size, len(text.tokens), self.page_size):
                following = text.tokens[at] if self.limits.max_drafts else 0
                if (text.state_at(at), following) not in in_pages:
                    break
                if text.state_at(at) in kept:
                    due[waiting.request_id] = at
        return due

    def check_hits(self, step: SchedulerOutput, due: dict[int, int], exactly: bool) -> None:
        """exactly: nothing left the cache while the step was scheduled."""
        for number in self.running():
            state = self.scheduler.requests.get(number)
            assert state is not None
            assert state.status is RequestStatus.RUNNING
            if number in due:
                (chunk,) = (chunk for chunk in step.chunks if chunk.state is state)
                if exactly:
                    assert chunk.start == due[number]
                assert chunk.start <= due[number]
                self.hits[number].append(chunk.start)

    def check(self) -> None:
        """Slots that nobody uses, and states that left the cache, are poisoned."""
        self.scheduler.check()
        self.ends()
        for slot in self.free_slots():
            self.slots[slot] = Slot()

    def free_slots(self) -> set[int]:
        """Slots of neither a row, nor a page, nor a step or row that has yet to give them away."""
        table, states = self.scheduler.table, self.scheduler.states
        used = {table.state_slot(row) for row in table.req_indices} | {*states.taken}
        cache = self.scheduler.page_table.allocator.cache
        used |= {cache.states.find(page).slot for page in cache.states.pages}
        used |= {copy.source for copy in states.donated.values()}
        return {*range(1, len(self.slots))} - used
