"""Continuous batching on one rank: which tokens of which requests go into the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.batch import Bool, Int64
from dp_runtime.core.per_request_state import PerRequestState
from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate
from dp_runtime.core.step_program import Pass, Program
from dp_runtime.metrics.trace import PrefixCounts
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.sampling.sampler import SampledTokens
from dp_runtime.scheduler.batch_builder import build_batches
from dp_runtime.scheduler.image_slots import ImageSlots
from dp_runtime.scheduler.lifecycle import RequestLifecycle
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.outputs import append_outputs
from dp_runtime.scheduler.page_table import PageTable
from dp_runtime.scheduler.request_state import RequestState, RequestStatus
from dp_runtime.scheduler.request_table import RequestTable
from dp_runtime.scheduler.scheduler_output import Chunk, PromptLogprobs, SchedulerOutput
from dp_runtime.scheduler.shared_prefixes import FoundPrefix, SharedPrefixes
from dp_runtime.scheduler.state_tracks import StateTracks


class Scheduler:
    """Chooses the rows of a rank's steps, and takes over what these sampled.

    Requests are admitted by priority, then in order of arrival, preempted ones before all others.
    One that begins with pages that another one computes is passed over until these are there. One
    that lacks pages preempts the youngest: the oldest always advances, and nothing that runs
    starves. Decodes come first for the token budget. At most one step is in flight while the next
    is scheduled; if it verifies, lengths are upper bounds, and a request that may have ended waits.
    """

    def __init__(
        self,
        pages: PageGeometry,
        limits: Limits,
        states: Sequence[PerRequestState] = (),
        hasher: PageHasher | None = None,
    ) -> None:
        """hasher: names the pages that requests share; without one they share none."""
        self.pages = pages
        self.limits = limits
        self.table = RequestTable(limits.num_table_rows, limits.keeps_state)
        self.page_table = PageTable(pages, *limits.page_table_sizes)
        self.images = ImageSlots(limits.num_image_slots, drafts=limits.max_drafts > 0)
        self.states = StateTracks(limits, self.table, self.page_table)
        self.requests = RequestLifecycle(self.table, (self.states, self.page_table, *states))
        self.prefixes = None
        if hasher is not None:
            self.prefixes = SharedPrefixes(hasher, self.table, self.page_table, self.states, limits)
        self.num_preemptions = 0
        self._failed: list[RequestUpdate] = []

    @property
    def has_work(self) -> bool:
        return bool(self.requests)

    @property
    def running(self) -> Int64:
        return self.requests.running

    @property
    def waiting(self) -> deque[RequestState]:
        return self.requests.waiting

    @property
    def num_free_pages(self) -> int:
        return self.page_table.allocator.num_free

    @property
    def prefix_counts(self) -> PrefixCounts:
        return PrefixCounts() if self.prefixes is None else self.prefixes.counts

    @property
    def queued_tokens(self) -> int:
        needed = self.table.num_needed(self.running)
        prefilling = self.table.prefilling(self.running, needed)
        return int(needed[prefilling].sum()) + self.requests.num_queued_tokens

    def add(self, request: RankRequest) -> None:
        """Queue a request; if it can not be served, `take_failed` says so."""
        try:
            admitted = self._admitted(request)
        except Exception as error:
            self._failed.append(RequestUpdate.failed(request.request_id, 0, error))
        else:
            self.requests.add(admitted)  # an id that is there twice is no request's own mistake

    def take_failed(self) -> list[RequestUpdate]:
        """Return what has ended for a reason of its own since the last call."""
        failed, self._failed = self._failed, []
        return failed

    def _admitted(self, request: RankRequest) -> RequestState:
        num_prompt_tokens = len(request.prompt_token_ids)
        room = self.limits.max_model_len - num_prompt_tokens
        max_outputs = min(request.params.known_max_tokens, room)
        max_cached = num_prompt_tokens + max_outputs + self.limits.max_drafts
        assert max_outputs >= 1, f"request {request.request_id} leaves no room for a token"
        assert self.page_table.pages_for(max_cached) < self.pages.num_pages, "it fits the pool"
        return RequestState(request, max_outputs)

    def abort(self, request_id: int) -> RequestUpdate | None:
        """End a request now; None if it has ended already."""
        request = self.requests.get(request_id)
        if request is None or request.finish_reason:
            return None
        self.requests.finish(request, FinishReason.ABORT)
        self.requests.settle()
        return request.told()

    def schedule(self, program: Program, prefill_budget: int | None = None) -> SchedulerOutput:
        query_len = program.query_len(Pass.TARGET)
        self.images.begin_step()
        running, needed = self.running, self.table.num_needed(self.running)
        prefilling = self.table.prefilling(running, needed)
        decoding = (needed > 0) & ~prefilling
        ready = self._reserve_pages(needed, decoding, query_len)
        ahead = len(ready)  # of those that were preempted meanwhile
        decodes = running[:ahead][decoding[:ahead] & ready]
        budget = self.limits.max_num_tokens - len(decodes) * query_len  # at least 0: see Limits
        budget = budget if prefill_budget is None else min(budget, prefill_budget)
        chunks: list[Chunk] = []
        for index in running[:ahead][prefilling[:ahead] & ready].tolist():
            if budget and (chunk := self._chunk(self.table.request(index), budget)):
                chunks.append(chunk)
                budget = max(0, budget - chunk.num_tokens)
        chunks += self._admit(budget) if ready.all() else []
        if self._failed:
            self.requests.settle()
        return self._launch(decodes, chunks, program)

    def commit(
        self, step: SchedulerOutput, tokens: SampledTokens, prompt_logprobs: PromptLogprobs = ()
    ) -> list[RequestUpdate]:
        self.table.committed(step.req_indices, step.target.query_lens)
        self._trust_pages(step, tokens)
        updates = self._commit_decodes(step, tokens)
        if step.chunks:
            updates += self._commit_chunks(step, tokens, prompt_logprobs)
        self.states.committed(step, tokens.num_accepted)
        if self.prefixes is not None:
            self.prefixes.committed(step.req_indices, step.sampled)
        self.requests.settle()
        return updates

    def check(self) -> None:
        self.requests.check()
        self.images.check()

    def _commit_decodes(self, step: SchedulerOutput, tokens: SampledTokens) -> list[RequestUpdate]:
        num_new, query_len = self._count_new(step, tokens), 1 + step.num_drafts
        token_ids, logprobs, scored = tokens.token_ids, tokens.logprobs, any(tokens.logprobs)
        updates, first = [], 0
        for req_index, count in zip(step.decodes.tolist(), num_new):
            request, end = self.table.request(req_index), first + count
            if not request.finish_reason:
                some, cause = tokens.valid_part(first, end)
                entries = logprobs[some] if scored else ()
                new = token_ids[some]
                updates.append(append_outputs(self.requests, request, new, entries, cause))
            first += query_len
        return updates

    def _count_new(self, step: SchedulerOutput, tokens: SampledTokens) -> Sequence[int]:
        """Count each decode's new tokens; with drafts the device reads the last ones itself."""
        if not step.num_drafts:
            self.table.set_last_tokens(step.sampled, tokens.token_ids)
            return (1,) * len(step.decodes)
        accepted = np.array(tokens.num_accepted, np.int64)
        self.table.rewind(step.decodes, step.num_drafts - accepted)
        return [int(count) + 1 for count in accepted]

    def _commit_chunks(
        self, step: SchedulerOutput, tokens: SampledTokens, prompt_logprobs: PromptLogprobs
    ) -> list[RequestUpdate]:
        first = len(step.decodes) * (1 + step.num_drafts)
        rows = iter(range(first, len(tokens.token_ids)))
        scores = iter(prompt_logprobs)
        updates = []
        for chunk in step.chunks:
            request, entries = chunk.state, next(scores) if chunk.scores else ()
            row = next(rows) if chunk.samples else None
            if request.finish_reason:
                continue
            request.num_reported = max(request.num_reported, chunk.score_end)
            if isinstance(entries, Exception):
                self._fail(request, entries)
            elif row is not None:
                some, cause = tokens.valid_part(row, row + 1)
                token_ids, logprobs = tokens.token_ids[some], tokens.logprobs[some]
                update = append_outputs(self.requests, request, token_ids, logprobs, cause, entries)
                updates.append(update)
            elif entries:
                at = len(request.outputs)
                updates.append(RequestUpdate(request.request_id, at, prompt_logprobs=entries))
        return updates

    def _trust_pages(self, step: SchedulerOutput, tokens: SampledTokens) -> None:
        """Trust what led to finite values, which depend on all pages of a request."""
        self.page_table.trust(step.req_indices)
        for req_index in step.not_finite(tokens):
            self.page_table.doubt(req_index)

    def _reserve_pages(self, needed: Int64, decoding: Bool, decode_query_len: int) -> Bool:
        """Give pages to running requests, oldest first; tells who of those still running go on."""
        req_indices = self.running
        rows = np.where(decoding, decode_query_len, np.minimum(needed, self.limits.max_num_tokens))
        ends = self.table.num_computed_tokens[req_indices] + rows
        ready = np.ones(len(req_indices), np.bool_)
        for place in (ends > self.page_table.max_tokens(req_indices)).nonzero()[0].tolist():
            if place >= len(self.running):
                break  # preempted for an older one, as are all that follow
            req_index = int(req_indices[place])
            missing = self.page_table.num_missing(req_index, int(ends[place]))
            if missing <= self.num_free_pages or self._preempt_for(req_index, missing):
                self.page_table.append(req_index, missing)
            else:
                ready[place] = False
        return ready[: len(self.running)]

    def _preempt_for(self, req_index: int, missing: int) -> bool:
        """Preempt younger requests until `missing` pages are free, or will be."""
        leaving: list[int] = []
        while self.num_free_pages + self.page_table.num_coming(leaving) < missing:
            youngest = int(self.running[-1])
            if youngest == req_index:
                return False
            if self.table.num_inflight_steps[youngest]:
                leaving.append(youngest)
            self.num_preemptions += 1
            self.requests.transition(self.table.request(youngest), RequestStatus.PREEMPTED)
            self.requests.settle()
        return missing <= self.num_free_pages

    def _admit(self, budget: int) -> list[Chunk]:
        """Start waiting requests, each with a token at least, while the free pages hold theirs."""
        chunks, places = list[Chunk](), self.limits.max_num_requests
        passed = 0  # who awaits pages of others keeps its turn, and a place
        while passed < len(self.waiting) and budget and len(self.running) + passed < places:
            request = self.waiting[passed]
            if request.status is RequestStatus.PREEMPTED or not self.table.has_free_row:
                break  # NOTE: nobody overtakes a preempted request that still has a step in flight
            found = FoundPrefix([]) if self.prefixes is None else self.prefixes.find(request)
            if self.prefixes is not None and self.prefixes.awaits(request, found):
                passed += 1
                continue
            if not self.page_table.fits(request.num_tokens + 1, found.pages):
                break
            if (chunk := self._begin(request, found, budget)) is None:
                continue
            self.page_table.reach(request.req_index, chunk.end)
            chunks.append(chunk)
            budget = max(0, budget - chunk.num_tokens)
        return chunks

    def _begin(self, request: RequestState, found: FoundPrefix, budget: int) -> Chunk | None:
        try:
            self.requests.transition(request, RequestStatus.RUNNING)
        except Exception as error:
            self._fail(request, error)
            return None
        if self.prefixes is not None:
            self.prefixes.begin(request, found)
        return self._chunk(request, budget)

    def _chunk(self, request: RequestState, budget: int) -> Chunk | None:
        """Take the next rows of a request, if any; it fails alone if it can not give them."""
        start = int(self.table.num_computed_tokens[request.req_index])
        needed = request.num_tokens - start
        try:
            rows = self.states.num_rows(request.req_index, start, needed, budget)
            self.page_table.doubt(request.req_index)
            return Chunk.for_budget(request, start, needed, rows, budget, self.images)
        except Exception as error:
            self._fail(request, error)
            return None

    def _fail(self, request: RequestState, error: Exception) -> None:
        """End a request, and no other; the caller settles."""
        self.requests.finish(request, FinishReason.ERROR)
        self._failed.append(RequestUpdate.failed(request.request_id, len(request.outputs), error))

    def _launch(self, decodes: Int64, chunks: list[Chunk], program: Program) -> SchedulerOutput:
        moves = self.states.moves(decodes, chunks, program.query_len(Pass.TARGET))
        step = build_batches(self.table, self.page_table, decodes, chunks, program, moves)
        rows = step.req_indices, step.sampled, decodes
        self.table.launched(*rows, step.target.seq_lens, step.num_drafts)
        for chunk in chunks:
            chunk.state.num_scored = max(chunk.state.num_scored, chunk.score_end)
        assert not self.requests or self.table.num_inflight_steps.any(), "no progress was made"
        return step
