"""Continuous batching on one rank: which tokens of which requests go into the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.batch import Int64
from dp_runtime.core.metadata import PageGeometry
from dp_runtime.core.program import Pass, Program
from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate, TokenLogprob
from dp_runtime.scheduler.batch_builder import build_batches
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.pages import PageAllocator
from dp_runtime.scheduler.request_state import NO_ROW, RequestState
from dp_runtime.scheduler.request_table import RequestTable
from dp_runtime.scheduler.scheduler_output import Chunk, SchedulerOutput, StepResult


class Scheduler:
    """Owns the requests and pages of a rank.

    Older requests come first for pages: one that lacks pages preempts the youngest, which starts
    over later from its tokens. So the oldest always advances and nothing starves. Decoding
    requests come first for the token budget; prefill chunks share what is left.
    At most one launched step may be uncommitted when the next is scheduled. Where programs draft,
    how many tokens they accept is known at the commit: until then lengths are upper bounds, pages
    are reserved for them, and a request that may have ended waits for the commit.
    """

    def __init__(self, pages: PageGeometry, limits: Limits) -> None:
        self.pages = pages
        self.limits = limits
        self.allocator = PageAllocator(pages.num_pages)
        # running requests, and as many that have stopped while the launched step touches them
        self.table = RequestTable(
            2 * limits.max_num_requests, self._pages_for(limits.max_cached_len)
        )
        self.waiting: deque[RequestState] = deque()
        self.running: Int64 = np.zeros(0, np.int64)  # rows of the table in the order of arrival
        self.num_preemptions = 0
        self._live: dict[int, RequestState] = {}
        self._waiting_tokens = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def queued_tokens(self) -> int:
        """Tokens of prompts, and of preempted requests, that are not yet computed."""
        needed = self.table.num_needed(self.running)
        prefilling = self.table.prefilling(self.running, needed)
        return int(needed[prefilling].sum()) + self._waiting_tokens

    def add(self, request: RankRequest) -> None:
        """Queue a request, which fits the cache alone."""
        room = self.limits.max_model_len - len(request.prompt_token_ids)
        max_outputs = min(request.params.max_tokens, room)
        most = len(request.prompt_token_ids) + max_outputs + self.limits.max_drafts
        assert max_outputs >= 1, f"request {request.request_id} leaves no room for a token"
        assert request.request_id not in self._live, f"request {request.request_id} twice"
        assert self._pages_for(most) < self.pages.num_pages, "a sequence fits the pool"
        live = RequestState(request, max_outputs)
        self._live[request.request_id] = live
        self.waiting.append(live)
        self._waiting_tokens += live.num_tokens

    def abort(self, request_id: int) -> RequestUpdate | None:
        """End a request now; None if it has ended already."""
        live = self._live.get(request_id)
        if live is None or live.finish_reason:
            return None
        self._finish(live, FinishReason.ABORT)
        return RequestUpdate(request_id, len(live.outputs), finish_reason=FinishReason.ABORT)

    def schedule(self, program: Program) -> SchedulerOutput:
        """Choose the rows of the next step; zero rows if there is nothing to do."""
        query_len = program.query_len(Pass.TARGET)
        ready = self._reserve_pages(query_len)
        rows = self.running[ready]
        needed = self.table.num_needed(rows)
        prefilling = self.table.prefilling(rows, needed)
        decodes = rows[(needed > 0) & ~prefilling]
        budget = self.limits.max_num_tokens - len(decodes) * query_len  # at least 0: see Limits
        chunks: list[Chunk] = []
        for row, count in zip(rows[prefilling].tolist(), needed[prefilling].tolist()):
            if budget:
                start = int(self.table.num_computed[row])
                chunks.append(Chunk.of(self.table.request(row), start, count, budget))
                budget -= chunks[-1].length
        if ready.all():
            chunks += self._admit(budget)
        return self._launch(decodes, chunks, program)

    def commit(self, step: SchedulerOutput, tokens: StepResult) -> list[RequestUpdate]:
        """Take over what a launched step sampled; returns what changed, request by request."""
        self.table.num_launched[step.rows] -= 1
        counts = self._keep_verified(step, tokens)
        token_ids, scored, query_len = tokens.token_ids, any(tokens.logprobs), 1 + step.num_drafts
        progress, first = [], 0
        for row, count in zip(step.decodes.tolist(), counts):
            live, end = self.table.request(row), first + count
            if not live.finish_reason:
                logprobs = tokens.logprobs[first:end] if scored else ()
                progress.append(self._advance(live, token_ids[first:end], logprobs))
            if not live.running:
                self._settle(live)
            first += query_len
        sampled = zip(tokens.token_ids[first:], tokens.logprobs[first:], strict=True)
        scores = iter(tokens.prompt_logprobs)
        for chunk in step.chunks:
            live = chunk.live
            prompt_logprobs = next(scores) if chunk.scores else ()
            if chunk.samples:
                token, logprob = next(sampled)
                if not live.finish_reason:
                    progress.append(self._advance(live, (token,), (logprob,), prompt_logprobs))
            elif prompt_logprobs and not live.finish_reason:
                outputs = len(live.outputs)
                progress.append(
                    RequestUpdate(live.request_id, outputs, prompt_logprobs=prompt_logprobs)
                )
            if not live.running:
                self._settle(live)
        return progress

    def _keep_verified(self, step: SchedulerOutput, tokens: StepResult) -> Sequence[int]:
        """Take back from the table what was not accepted; how many new tokens each decode has.

        Without drafts the projection was exact. With drafts last tokens are read on the device.
        """
        table, decodes = self.table, step.decodes
        if not step.num_drafts:
            table.last_token[step.sampled] = tokens.token_ids
            return (1,) * len(decodes)
        accepted = np.array(tokens.num_accepted, np.int64)
        table.num_known[decodes] -= step.num_drafts - accepted
        table.num_computed[decodes] -= step.num_drafts - accepted
        counts: list[int] = (accepted + 1).tolist()
        return counts

    def check(self) -> None:
        """Assert that no page is lost, shared, or held by a request that is gone."""
        held = [live for live in self._live.values() if live.row != NO_ROW]
        self.allocator.check({live.request_id: self.table.pages(live.row) for live in held})
        queued = sum(live.num_tokens for live in self.waiting)
        assert queued == self._waiting_tokens, f"{queued} tokens wait, not {self._waiting_tokens}"

    def _advance(
        self,
        live: RequestState,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob | None, ...],
        prompt_logprobs: tuple[TokenLogprob, ...] = (),
    ) -> RequestUpdate:
        """Append new tokens up to the first that ends the request."""
        request, index, stop = live.request, len(live.outputs), None
        if len(tokens) > live.max_outputs - index:
            tokens = tokens[: live.max_outputs - index]
        if not request.stop_token_ids.isdisjoint(tokens):
            stop = next(token for token in tokens if token in request.stop_token_ids)
            tokens = tokens[: tokens.index(stop) + 1]
        live.outputs += tokens
        if not live.running:
            self._waiting_tokens += len(tokens)
        if stop is not None or len(live.outputs) == live.max_outputs:
            self._finish(live, FinishReason.LENGTH if stop is None else FinishReason.STOP)
        known = tuple(entry for entry in logprobs[: len(tokens)] if entry) if logprobs else ()
        return RequestUpdate(
            request.request_id, index, tokens, known, prompt_logprobs, live.finish_reason, stop
        )

    def _finish(self, live: RequestState, reason: FinishReason) -> None:
        live.finish_reason = reason
        if live.running:
            self._stop(live)
        else:
            self.waiting.remove(live)
            self._waiting_tokens -= live.num_tokens
        self._settle(live)

    def _stop(self, live: RequestState) -> None:
        self.running = self.running[self.running != live.row]
        live.running = False

    def _settle(self, live: RequestState) -> None:
        """Once no launched step touches a request that has stopped, its pages go back."""
        if live.row != NO_ROW and not self.table.num_launched[live.row]:
            self.allocator.release(live.request_id, self.table.pages(live.row))
            self.table.free(live)
        if live.row == NO_ROW and live.finish_reason:
            self._live.pop(live.request_id, None)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pages.page_size)

    def _reserve_pages(self, query_len: int) -> NDArray[np.bool_]:
        """Give pages to running requests, oldest first; which of them can go on.

        query_len: of a decode.
        """
        rows, table = self.running, self.table
        needed = np.minimum(table.num_needed(rows), self.limits.max_num_tokens)
        decoding = (needed == 1) & ~table.prefilling(rows, needed)
        due = table.num_computed[rows] + np.where(decoding, query_len, needed)
        ready = np.ones(len(rows), np.bool_)
        for index in (due > table.num_pages[rows] * self.pages.page_size).nonzero()[0].tolist():
            if index >= len(self.running):
                break  # preempted for an older one, as are all that follow
            row = int(rows[index])
            missing = self._pages_for(int(due[index])) - int(table.num_pages[row])
            if missing <= self.allocator.num_free or self._preempt_for(row, missing):
                self._grow(row, missing)
            else:
                ready[index] = False
        return ready[: len(self.running)]

    def _preempt_for(self, row: int, missing: int) -> bool:
        """Preempt younger requests until `missing` pages are free, or will be."""
        coming = 0
        while self.allocator.num_free + coming < missing:
            youngest = int(self.running[-1])
            if youngest == row:
                return False
            if self.table.num_launched[youngest]:
                coming += int(self.table.num_pages[youngest])
            self._preempt(self.table.request(youngest))
        return missing <= self.allocator.num_free

    def _preempt(self, victim: RequestState) -> None:
        self.num_preemptions += 1
        self._stop(victim)
        self.waiting.appendleft(victim)
        self._waiting_tokens += victim.num_tokens
        self._settle(victim)

    def _grow(self, row: int, count: int) -> None:
        request_id = int(self.table.request_ids[row])
        self.table.add_pages(row, self.allocator.allocate(request_id, count))

    def _admit(self, budget: int) -> list[Chunk]:
        """Start waiting requests while their known tokens fit the free pages.

        Each gets a token of the budget at least, so running requests are never more than it.
        """
        chunks = []
        while self.waiting and budget and len(self.running) < self.limits.max_num_requests:
            live = self.waiting[0]
            fits = self._pages_for(live.num_tokens + 1) <= self.allocator.num_free
            if live.row != NO_ROW or not fits:
                break  # NOTE: a preempted request waits for the step that still holds its pages
            self.waiting.popleft()
            self._waiting_tokens -= live.num_tokens
            row = self.table.take(live)
            live.running = True
            self.running = np.append(self.running, row)
            chunk = Chunk.of(live, 0, live.num_tokens, budget)
            self._grow(row, self._pages_for(chunk.length))
            chunks.append(chunk)
            budget -= chunk.length
        return chunks

    def _launch(self, decodes: Int64, chunks: list[Chunk], program: Program) -> SchedulerOutput:
        step = build_batches(self.table, decodes, chunks, self.pages.page_size, program)
        target = step.batches[program.passes.index(Pass.TARGET)]
        new_tokens = np.ones(len(step.sampled), np.int64)
        new_tokens[: len(decodes)] += step.num_drafts
        self.table.launch(step.rows, target.seq_lens, step.sampled, new_tokens)
        for chunk in chunks:
            chunk.live.num_scored = max(chunk.live.num_scored, chunk.score_end)
        launched = self.table.num_launched
        assert not self._live or launched.any(), "the scheduler made no progress"
        return step
