"""RequestState: one request on its rank, and what the host knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from time import perf_counter

import numpy as np

from dp_runtime.core.batch import Int64
from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate
from dp_runtime.prefix_cache.prefix_cache import CachedPage
from dp_runtime.vision.rope_positions import rope_positions

NO_ROW = -1


class RequestStatus(Enum):
    """WAITING ──> RUNNING ──> STOPPING ──> ENDED
    ^           v           ^
    └────── PREEMPTED ──────┘        (WAITING ──> STOPPING: aborted in the queue)
    """

    WAITING = "waiting"  # queued, without a row in the request table
    RUNNING = "running"  # has a row, and steps are scheduled for it
    PREEMPTED = "preempted"  # queued, but keeps its row until its launched step is committed
    STOPPING = "stopping"  # has its finish reason, and keeps its row likewise
    ENDED = "ended"

    @property
    def successors(self) -> frozenset[RequestStatus]:
        return _SUCCESSORS[self]

    @property
    def is_queued(self) -> bool:
        return self in (RequestStatus.WAITING, RequestStatus.PREEMPTED)


_SUCCESSORS = {
    RequestStatus.WAITING: frozenset({RequestStatus.RUNNING, RequestStatus.STOPPING}),
    RequestStatus.RUNNING: frozenset({RequestStatus.PREEMPTED, RequestStatus.STOPPING}),
    RequestStatus.PREEMPTED: frozenset({RequestStatus.WAITING, RequestStatus.STOPPING}),
    RequestStatus.STOPPING: frozenset({RequestStatus.ENDED}),
    RequestStatus.ENDED: frozenset(),
}


@dataclass(eq=False, slots=True)
class RequestState:
    request: RankRequest
    max_outputs: int
    prompt: Int64 = field(init=False)
    prompt_rope: Int64 | None = field(init=False)  # [3, prompt]; None: without images
    rope_delta: int = field(init=False)  # from a later token's index to its position
    turn: float = field(init=False)  # in the queue, lowest first
    outputs: list[int] = field(init=False)  # committed
    digests: list[bytes] = field(default_factory=list)  # of its first full pages
    contents: list[bytes] = field(default_factory=list)  # of the same pages
    found: list[CachedPage] = field(default_factory=list)  # as it was matched last, in the queue
    num_prompt_cached: int | None = None  # of its prompt, when it first ran
    status: RequestStatus = RequestStatus.WAITING  # changed by RequestLifecycle.transition alone
    req_index: int = NO_ROW  # its row in the request table
    num_scored: int = field(init=False)  # prompt positions whose log probabilities were asked for
    num_reported: int = field(init=False)  # and those whose were reported
    num_routed: int = field(init=False)  # positions whose experts were reported
    finish_reason: FinishReason | None = None
    queued_at: float | None = field(default_factory=perf_counter)  # until it runs first

    def __post_init__(self) -> None:
        self.prompt = np.array(self.request.prompt_token_ids, np.int64)
        self.prompt_rope, self.rope_delta = None, 0
        if self.request.images:
            own = len(self.prompt), self.request.images
            self.prompt_rope, self.rope_delta = rope_positions(*own)
        self.turn = self.request.params.priority
        self.outputs = list(self.request.outputs)
        self.num_scored = self.num_reported = self.request.num_scored
        self.num_routed = self.request.num_routed

    @property
    def request_id(self) -> int:
        return self.request.request_id

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.outputs)

    @property
    def num_reusable_tokens(self) -> int:
        """Count tokens that need not be computed: neither the last nor what is yet to be told.

        None of a request that brings experts: what others computed went to other ones.
        """
        if self.request.replay is not None:
            return 0
        params, count = self.request.params, self.num_tokens - 1
        if params.prompt_logprobs is not None and self.num_scored < self.num_prompt_tokens - 1:
            count = min(count, self.num_scored)
        return min(count, self.num_routed) if params.return_routed_experts else count

    @property
    def cause_of_no_token(self) -> str:
        cause = f"the model gave NaN or infinite logits for its token {len(self.outputs)}"
        params = self.request.params
        names = [name for name in ("bad_words", "structured_outputs") if getattr(params, name)]
        return f"{cause}, or {' and '.join(names)} leave none to choose" if names else cause

    def told(self) -> RequestUpdate:
        """Tell how a request has ended without another token."""
        cached = self.num_prompt_cached or 0
        return RequestUpdate(
            self.request_id, len(self.outputs), finish_reason=self.finish_reason,
            num_cached_tokens=cached,
        )  # fmt: skip

    def rope(self, start: int, end: int) -> Int64:
        """Return the positions by which tokens [start, end) are rotated, [3, end - start]."""
        later = np.arange(start, end) + self.rope_delta
        known = self.prompt_rope
        if known is None:
            return np.stack([later] * 3)
        known = known[:, start:end]
        return np.concatenate((known, np.stack([later[known.shape[1] :]] * 3)), 1)

    def tokens(self, start: int, end: int) -> Int64:
        count = self.num_prompt_tokens
        if end <= count:
            return self.prompt[start:end]
        outputs = np.array(self.outputs[max(0, start - count) : end - count], np.int64)
        return outputs if start >= count else np.concatenate([self.prompt[start:], outputs])
