"""StateTracks: which recurrent states requests begin with, and which they leave for others."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from dp_runtime.core.batch import Int64, StateSlots
from dp_runtime.core.recurrent_metadata import CHUNK
from dp_runtime.core.request import RankRequest
from dp_runtime.metrics.status import StateUse
from dp_runtime.prefix_cache.state_checkpoints import Checkpoint
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.page_table import PageTable
from dp_runtime.scheduler.request_table import RequestTable
from dp_runtime.scheduler.scheduler_output import (
    NO_MOVES,
    Chunk,
    SchedulerOutput,
    StateCopy,
    StateMoves,
    StateRestore,
    StateTrack,
)


class StateTracks:
    """Has states copied behind full pages: near a prompt's end, and every so many tokens after it.

    A copy belongs to the step that writes it until that step is committed: only then is it known
    whether the state came to a page's end, and how many accepted drafts are before that.
    """

    def __init__(self, limits: Limits, table: RequestTable, pages: PageTable) -> None:
        self.are_kept = limits.keeps_state  # else layers have pages alone
        self.checkpoints = pages.allocator.cache.states
        self._has_slots = limits.num_state_checkpoints > 0
        self._max_drafts = limits.max_drafts
        self._interval = limits.state_track_interval  # tokens of an output; 0: none is copied
        self._table = table
        self._pages = pages
        self._begins: dict[int, int] = {}  # by row: the page whose state its next chunk begins with
        self._branches: dict[int, int] = {}  # by row: where cached pages part, without a state yet
        self._written: dict[int, dict[int, Checkpoint]] = {}  # by row and position, committed
        self._newest: dict[int, int] = {}  # by row: the page that got the last state of its output
        self._accepted: dict[int, int] = {}  # by row: drafts of its last committed step
        self.donated: dict[int, StateCopy] = {}  # by target: for the next step that has rows
        self._in_flight: deque[StateMoves] = deque()

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        others = (self._begins, self._branches, self._written, self._newest)
        assert not any(req_index in each for each in others), f"row {req_index} has another's state"

    def remove(self, req_index: int) -> None:
        """Keep the state of a row that is left, if it ends with a cached page."""
        if self._has_slots and req_index not in self._begins:
            self._donate(req_index)
        self._forget(req_index)

    def _forget(self, req_index: int) -> None:
        if req_index in self._begins:
            self.checkpoints.unlock(self._begins.pop(req_index))
        for checkpoint in self._written.pop(req_index, {}).values():
            self.checkpoints.give_back(checkpoint.slot)
        self._branches.pop(req_index, None)
        self._newest.pop(req_index, None)
        self._accepted.pop(req_index, None)

    @property
    def taken(self) -> list[int]:
        """Slots that steps in flight write, or that wait for their page to be cached."""
        slots = [each.slot for of_row in self._written.values() for each in of_row.values()]
        return slots + [track.copy.target for moves in self._in_flight for track in moves.tracks]

    @property
    def use(self) -> StateUse:
        """Tell how many slots there are and are free, for any thread."""
        if not self.are_kept:
            return StateUse()
        table, kept = self._table, self.checkpoints
        own = table.num_rows, table.num_free_rows
        return StateUse(*own, len(kept.slots), kept.num_free, kept.num_evictions)

    def check(self, req_indices: Sequence[int]) -> None:
        self.checkpoints.check(self.taken)
        for each in (self._begins, self._branches, self._written, self._newest):
            assert {*each} <= {*req_indices}, f"states of rows {sorted(each)}, which nobody has"

    def begin(self, req_index: int, pages: Sequence[int], branch: int) -> None:
        """Have a row go on from the state behind these pages, and leave one at `branch`, if any."""
        if pages and self.are_kept:
            self.checkpoints.lock(pages[-1])
            self._begins[req_index] = pages[-1]
        if branch:
            self._branches[req_index] = branch

    def num_promised(self, num_tokens: int, branch: int) -> int:
        """Count the pages whose state a request that begins now will leave; 0: it leaves none.

        It may be left some pages before the last one, where a chunk of the kernels ends.
        """
        if not (self._has_slots and self._interval):
            return 0
        return (branch or num_tokens - 1) // self._pages.page_size

    def num_rows(self, req_index: int, start: int, needed: int, budget: int) -> int:
        """Choose a chunk's length: one that is cut ends with a page if it can."""
        rows, branch = min(needed, budget), self._branches.get(req_index, 0)
        if not self._has_slots:
            return rows
        if start < branch < start + rows and (branch - start) % CHUNK:
            return branch - start
        in_pages = (start + rows) // self._pages.page_size * self._pages.page_size - start
        return in_pages if rows < needed and in_pages > 0 else rows

    def moves(self, decodes: Int64, chunks: Sequence[Chunk], query_len: int) -> StateMoves:
        if not self._has_slots:
            return NO_MOVES
        rows = [*decodes.tolist(), *(chunk.state.req_index for chunk in chunks)]
        if not rows:
            return NO_MOVES  # for maybe no step runs
        restored = [*self._restores(rows)]
        tracks = list[StateTrack]()
        if self._interval:
            tracks = [*self._chunk_tracks(chunks), *self._decode_tracks(decodes, query_len)]
        moves = StateMoves(self._take_donated(), tuple(restored), tuple(tracks))
        if moves:
            self._in_flight.append(moves)
        return moves

    def _take_donated(self) -> tuple[StateCopy, ...]:
        donated, self.donated = tuple(self.donated.values()), {}
        return donated

    def _restores(self, req_indices: Sequence[int]) -> Iterator[StateRestore]:
        for req_index in self._begins.keys() & req_indices:
            page = self._begins.pop(req_index)
            checkpoint = self.checkpoints.find(page)
            own = self._table.state_slot(req_index)
            yield StateRestore(page, StateCopy(checkpoint.slot, own, checkpoint.num_accepted))

    def _chunk_tracks(self, chunks: Sequence[Chunk]) -> Iterator[StateTrack]:
        for chunk in chunks:
            position = self._position_in(chunk)
            if position is not None and (slot := self.checkpoints.take()) is not None:
                rows = position - chunk.start if position < chunk.end else 0
                yield self._track(chunk.state.req_index, slot, position, rows)

    def _position_in(self, chunk: Chunk) -> int | None:
        """Find where cached pages part, or the last page's end before a row is left to compute."""
        if chunk.state.request.replay is not None:
            return None  # its pages are never cached
        start, end, page_size = chunk.start, chunk.end, self._pages.page_size
        position = self._branches.get(chunk.state.req_index, 0)
        if not start < position <= end:
            position = (chunk.state.num_tokens - 1) // page_size * page_size
            if end < position < end + CHUNK and not end % page_size:
                position = end  # what is left is too short for a chunk of the kernels
        if position > end:
            return None
        while position > start and position != end and (position - start) % CHUNK:
            position -= page_size
        return position if position > start else None

    def _decode_tracks(self, decodes: Int64, query_len: int) -> Iterator[StateTrack]:
        """Copy states that may come to a multiple of the interval in this step."""
        computed, in_flight = self._table.num_computed_tokens, self._table.num_inflight_steps
        most = computed[decodes] + query_len
        # Lengths are upper bounds while a verification is in flight.
        least = computed[decodes] - self._max_drafts * (in_flight[decodes] > 0)
        passes = most // self._interval * self._interval > least
        for req_index in decodes[passes].tolist():
            if req_index in self._table.replays_routing:
                continue
            if (slot := self.checkpoints.take()) is not None:
                yield self._track(req_index, slot)

    def _track(self, req_index: int, slot: int, position: int = 0, num_rows: int = 0) -> StateTrack:
        copy = StateCopy(self._table.state_slot(req_index), slot)
        return StateTrack(req_index, copy, position, num_rows)

    def committed(self, step: SchedulerOutput, num_accepted: Sequence[int]) -> None:
        """Take over what a step wrote; the table has its true lengths by now."""
        if not self._has_slots:
            return
        self._accepted |= dict.fromkeys(step.req_indices.tolist(), 0)
        self._accepted |= zip(step.decodes.tolist(), num_accepted)
        if not (moves := step.states):
            return
        assert self._in_flight.popleft() is moves, "steps are committed in the order of launch"
        for restore in moves.restored:
            self.checkpoints.unlock(restore.page)
        for track in moves.tracks:
            position, passed = track.position, 0
            if not position:
                position, passed = self._last_end(track.req_index, self._interval)
            of_row = self._written.setdefault(track.req_index, {})
            if passed < 0 or position in of_row:
                self.checkpoints.give_back(track.copy.target)
            else:
                of_row[position] = Checkpoint(track.copy.target, passed)

    def _last_end(self, req_index: int, grid: int) -> tuple[int, int]:
        """Find the last multiple of `grid` tokens, and how many drafts lie between state and it."""
        cached = int(self._table.num_cached_tokens[req_index])
        position = cached // grid * grid
        return position, position - (cached - self._accepted.get(req_index, 0))

    def attach(self, req_indices: Int64) -> None:
        """Give states to the pages that they are behind, once these are cached."""
        for req_index in self._written.keys() & {*req_indices.tolist()}:
            of_row, page_size = self._written[req_index], self._pages.page_size
            cached = int(self._pages.num_cached[req_index]) * page_size
            for position in sorted(position for position in of_row if position <= cached):
                page = self._pages.page(req_index, position // page_size - 1)
                self.checkpoints.attach(page, of_row.pop(position))
                if position >= self._table.num_prompt_tokens[req_index]:
                    self._supersede(req_index, page)

    def _supersede(self, req_index: int, page: int) -> None:
        """Of the states of an output all but the last are the first to be given up."""
        before = self._newest.get(req_index, page)
        if before != page:
            self.checkpoints.demote(before)
        self._newest[req_index] = page

    def _donate(self, req_index: int) -> None:
        position, passed = self._last_end(req_index, self._pages.page_size)
        number = position // self._pages.page_size
        if passed < 0 or not 0 < number <= self._pages.num_cached[req_index]:
            return
        page = self._pages.page(req_index, number - 1)
        if page not in self.checkpoints and (slot := self.checkpoints.take()) is not None:
            self.checkpoints.attach(page, Checkpoint(slot, passed))
            self.donated[slot] = StateCopy(self._table.state_slot(req_index), slot)
            if position >= self._table.num_prompt_tokens[req_index]:
                self._supersede(req_index, page)

    def abandon(self) -> None:
        """Forget the steps in flight, which wrote nobody knows what, and states never copied."""
        for req_index in self._begins:
            self._table.begin_at(req_index, 0)
        lost = {*self.donated}
        for moves in self._in_flight:
            for restore in moves.restored:
                self.checkpoints.unlock(restore.page)
            for track in moves.tracks:
                self.checkpoints.give_back(track.copy.target)
            lost |= {copy.target for copy in moves.donated}
        self._in_flight.clear()
        self.donated.clear()
        self.checkpoints.drop_slots(lost)
        for req_index in self._table.req_indices:
            self._forget(req_index)


def with_tracks(states: StateSlots, req_indices: Int64, tracks: Sequence[StateTrack]) -> StateSlots:
    """Tell a target pass of these rows of the table which states it leaves on the way."""
    if not any(track.num_rows for track in tracks):
        return states
    slots, rows = np.zeros(len(states), np.int64), np.zeros(len(states), np.int32)
    for track in tracks:
        if track.num_rows:
            at = req_indices == track.req_index
            slots[at], rows[at] = track.copy.target, track.num_rows
    return replace(states, track_slots=slots, track_rows=rows)
