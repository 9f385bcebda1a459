"""Continuous batching on one rank: which tokens of which requests go into the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from dp_runtime.batch import LocalBatch
from dp_runtime.batch_builder import Part, build_batch
from dp_runtime.kv_cache import PageAllocator
from dp_runtime.live_request import LiveRequest
from dp_runtime.metadata import PageGeometry
from dp_runtime.program import Program, Slot
from dp_runtime.request import FinishReason, RankRequest, RequestProgress, TokenLogprob
from dp_runtime.sampling import SampleRow


@dataclass(frozen=True)
class Limits:
    """What a step and a sequence of one rank may hold."""

    max_num_requests: int
    max_num_tokens: int
    max_model_len: int


@dataclass(frozen=True, eq=False)
class Scheduled:
    """The rows of one rank for one step: a batch per slot, and who they belong to."""

    batches: tuple[LocalBatch, ...]  # one per slot of the program
    parts: tuple[Part, ...]  # the target slot's, one per request
    samples: tuple[SampleRow, ...]  # the target slot's first sample rows
    scored: tuple[Part, ...]  # parts whose prompt rows follow among the sample rows

    @property
    def real_rows(self) -> tuple[int, ...]:
        return tuple(batch.num_tokens for batch in self.batches)

    @property
    def prefill(self) -> bool:
        return any(part.length > 1 for part in self.parts)


@dataclass(frozen=True)
class StepTokens:
    """What a step sampled, on the host, in the order of `Scheduled.samples` and `.scored`."""

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprob | None]
    prompt_logprobs: Sequence[tuple[TokenLogprob, ...]]


class Scheduler:
    """Owns the requests and pages of a rank.

    Older requests come first for pages: one that lacks pages preempts the youngest, which starts
    over later from its tokens. So the oldest always advances and nothing starves. Decoding
    requests come first for the token budget; prefill chunks share what is left.
    """

    def __init__(self, pages: PageGeometry, limits: Limits) -> None:
        self.pages = pages
        self.limits = limits
        self.allocator = PageAllocator(pages.num_pages)
        self.waiting: deque[LiveRequest] = deque()
        self.running: list[LiveRequest] = []  # in the order of arrival
        self.num_preemptions = 0
        self._live: dict[int, LiveRequest] = {}
        self._num_arrived = 0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    @property
    def queued_tokens(self) -> int:
        """Tokens of prompts, and of preempted requests, that are not yet computed."""
        running = (live.num_needed for live in self.running if live.prefilling)
        return sum(running) + sum(live.num_tokens for live in self.waiting)

    def add(self, request: RankRequest) -> None:
        """Queue a request, which fits the cache alone."""
        room = self.limits.max_model_len - len(request.prompt_token_ids)
        max_outputs = min(request.params.max_tokens, room)
        most = len(request.prompt_token_ids) + max_outputs
        assert max_outputs >= 1, f"request {request.request_id} leaves no room for a token"
        assert request.request_id not in self._live, f"request {request.request_id} twice"
        assert self._pages_for(most) < self.pages.num_pages, "a sequence fits the pool"
        live = LiveRequest(request, self._num_arrived, max_outputs, self._pages_for(most))
        self._num_arrived += 1
        self._live[request.request_id] = live
        self.waiting.append(live)

    def abort(self, request_id: int) -> RequestProgress | None:
        """End a request now; None if it has ended already."""
        live = self._live.get(request_id)
        if live is None or live.finish_reason:
            return None
        index = live.num_tokens - live.num_prompt
        self._finish(live, FinishReason.ABORT)
        return RequestProgress(request_id, index, finish_reason=FinishReason.ABORT)

    def schedule(self, program: Program) -> Scheduled:
        """Choose the rows of the next step; zero rows if there is nothing to do."""
        running = self._reserve_pages()
        budget = self.limits.max_num_tokens
        parts: list[Part] = []
        for live in sorted(running, key=lambda live: (live.prefilling, live.arrival)):
            length = min(live.num_needed, budget)
            if length:
                parts.append(Part.of(live, length))
                budget -= length
        if len(running) == len(self.running):
            parts += self._admit(budget)
        launched = any(live.num_launched for live in self._live.values())
        assert parts or launched or not self._live, "the scheduler made no progress"
        return self._launch(parts, program)

    def commit(self, step: Scheduled, tokens: StepTokens) -> list[RequestProgress]:
        """Take over what a launched step sampled; returns what changed, request by request."""
        sampled = zip(step.samples, tokens.token_ids, tokens.logprobs, strict=True)
        by_request = {row.request_id: (token, logprob) for row, token, logprob in sampled}
        scores = {
            part.live.request_id: score
            for part, score in zip(step.scored, tokens.prompt_logprobs, strict=True)
        }
        progress = []
        for part in step.parts:
            live = part.live
            live.num_launched -= 1
            if not live.finish_reason:
                token = by_request.get(live.request_id)
                progress.append(self._advance(live, token, scores.get(live.request_id, ())))
            if live.num_launched == 0:
                self._settle(live)
        return [item for item in progress if item.token_ids or item.prompt_logprobs]

    def check(self) -> None:
        """Assert that no page is lost, shared, or held by a request that is gone."""
        self.allocator.check({live.request_id: live.pages for live in self._live.values()})

    def _advance(
        self,
        live: LiveRequest,
        sampled: tuple[int, TokenLogprob | None] | None,
        prompt_logprobs: tuple[TokenLogprob, ...],
    ) -> RequestProgress:
        index = live.num_tokens - live.num_prompt
        if sampled is None:
            return RequestProgress(live.request_id, index, prompt_logprobs=prompt_logprobs)
        token, logprob = sampled
        live.tokens[live.num_tokens] = token
        live.num_tokens += 1
        live.num_pending -= 1
        stopped = token in live.request.stop_token_ids
        reason = FinishReason.STOP if stopped else None
        if not stopped and index + 1 == live.max_outputs:
            reason = FinishReason.LENGTH
        if reason:
            self._finish(live, reason)
        return RequestProgress(
            live.request_id,
            index,
            (token,),
            (logprob,) if logprob else (),
            prompt_logprobs,
            reason,
            token if stopped else None,
        )

    def _finish(self, live: LiveRequest, reason: FinishReason) -> None:
        live.finish_reason = reason
        if live.running:
            self._stop(live)
        else:
            self.waiting.remove(live)
        if live.num_launched == 0:
            self._settle(live)

    def _stop(self, live: LiveRequest) -> None:
        self.running.remove(live)
        live.running = False

    def _settle(self, live: LiveRequest) -> None:
        """No launched step touches the request: pages it has no use for go back."""
        if not live.running:
            self._release(live)
        if live.finish_reason:
            self._live.pop(live.request_id, None)

    def _release(self, live: LiveRequest) -> None:
        self.allocator.release(live.request_id, live.pages)
        live.num_pages = 0

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.pages.page_size)

    def _reserve_pages(self) -> list[LiveRequest]:
        """Give pages to running requests, oldest first; returns those that can go on."""
        ready = []
        for live in list(self.running):
            if not live.running:
                continue  # preempted for an older one
            tokens = live.num_computed + min(live.num_needed, self.limits.max_num_tokens)
            missing = self._pages_for(tokens) - live.num_pages
            if missing <= self.allocator.num_free or self._preempt_for(live, missing):
                self._grow(live, missing)
                ready.append(live)
        return ready

    def _preempt_for(self, live: LiveRequest, missing: int) -> bool:
        """Preempt younger requests until `missing` pages are free, or will be."""
        coming = 0
        while self.allocator.num_free + coming < missing:
            victim = self.running[-1]
            if victim is live:
                return False
            coming += victim.num_pages if victim.num_launched else 0
            self._preempt(victim)
        return missing <= self.allocator.num_free

    def _preempt(self, victim: LiveRequest) -> None:
        self.num_preemptions += 1
        self._stop(victim)
        self.waiting.appendleft(victim)
        victim.num_computed = 0
        if victim.num_launched == 0:
            self._release(victim)

    def _grow(self, live: LiveRequest, count: int) -> None:
        if count > 0:
            new = self.allocator.allocate(live.request_id, count)
            live.page_ids[live.num_pages : live.num_pages + count] = new
            live.num_pages += count

    def _admit(self, budget: int) -> list[Part]:
        """Start waiting requests while their known tokens fit the free pages."""
        parts = []
        while self.waiting and budget and len(self.running) < self.limits.max_num_requests:
            live = self.waiting[0]
            length = min(live.num_needed, budget)
            fits = self._pages_for(live.num_tokens + 1) <= self.allocator.num_free
            if live.num_launched or not fits:
                break  # NOTE: a preempted request waits for the step that still holds its pages
            self.waiting.popleft()
            self.running.append(live)
            live.running = True
            self._grow(live, self._pages_for(length))
            parts.append(Part.of(live, length))
            budget -= length
        return parts

    def _launch(self, parts: list[Part], program: Program) -> Scheduled:
        built = build_batch(parts, self.pages.page_size)
        for part in parts:
            live = part.live
            live.num_launched += 1
            live.num_computed = part.end
            live.num_scored = max(live.num_scored, part.score_end)
            live.source_row = -1
        for row, part in enumerate(part for part in parts if part.samples):
            part.live.num_pending += 1
            part.live.source_row = row
        batches = tuple(
            built.batch if slot is Slot.TARGET else LocalBatch.empty() for slot in program.slots
        )
        return Scheduled(batches, tuple(parts), built.samples, built.scored)
