"""RequestTable: what every step reads and changes of a rank's requests, as arrays."""

from __future__ import annotations

import numpy as np

from dp_runtime.core.batch import NULL_SLOT, Bool, Int32, Int64
from dp_runtime.scheduler.request_state import NO_ROW, RequestState


class RequestTable:
    """One row for each admitted request; its columns are written by its methods alone.

    `num_tokens` and `num_computed_tokens` count steps in flight as if all drafts were accepted.
    keeps_state: layers have a recurrent state, and each row a slot of its own in it.
    """

    def __init__(self, num_rows: int, keeps_state: bool = False) -> None:
        def column() -> Int64:
            return np.zeros(num_rows, np.int64)

        self.request_ids = column()
        self.num_prompt_tokens = column()
        self.max_tokens = column()  # prompt and outputs
        self.num_tokens = column()  # prompt and outputs, those that steps in flight sample included
        self.num_computed_tokens = column()  # in the cache once the steps in flight are done
        self.num_cached_tokens = column()  # in the cache by what committed steps wrote
        self.num_inflight_steps = column()
        self.last_token = column()  # of those that the host knows
        self.last_sample_index = column()  # of the newest token in its step's samples, or -1
        self.rope_deltas = column()  # of requests with images: positions minus indices
        # Rows of what few requests have, or none: a step that finds a set empty asks no further.
        self.have_images = set[int]()
        self.returns_routing = set[int]()  # who asked for their tokens' experts
        self.replays_routing = set[int]()  # who brought them
        self.keeps_state = keeps_state
        self._requests: list[RequestState | None] = [None] * num_rows
        self._free = list(reversed(range(num_rows)))

    @property
    def req_indices(self) -> list[int]:
        return [index for index, request in enumerate(self._requests) if request is not None]

    @property
    def num_rows(self) -> int:
        return len(self._requests)

    @property
    def num_free_rows(self) -> int:
        return len(self._free)

    @property
    def has_free_row(self) -> bool:
        return bool(self._free)

    def state_slots(self, req_indices: Int64) -> Int64:
        """Return the slot of each row in the recurrent states."""
        return req_indices + (NULL_SLOT + 1)

    def state_slot(self, req_index: int) -> int:
        return req_index + NULL_SLOT + 1

    def take(self, request: RequestState) -> int:
        assert request.req_index == NO_ROW, f"request {request.request_id} has a row already"
        assert self._free, f"{len(self._requests)} rows, and none is free"
        (last_token,) = request.tokens(request.num_tokens - 1, request.num_tokens)
        index = request.req_index = self._free.pop()
        self._requests[index] = request
        self.request_ids[index] = request.request_id
        self.num_prompt_tokens[index] = request.num_prompt_tokens
        self.max_tokens[index] = request.num_prompt_tokens + request.max_outputs
        self.num_tokens[index] = request.num_tokens
        self.num_computed_tokens[index] = self.num_cached_tokens[index] = 0
        self.num_inflight_steps[index] = 0
        self.rope_deltas[index] = request.rope_delta
        self.last_token[index] = last_token
        self.last_sample_index[index] = -1
        if request.prompt_rope is not None:
            self.have_images.add(index)
        if request.request.params.return_routed_experts:
            self.returns_routing.add(index)
        if request.request.replay is not None:
            self.replays_routing.add(index)
        return index

    def begin_at(self, req_index: int, num_tokens: int) -> None:
        """Have so many tokens of a row in the cache, and no step of it in flight."""
        assert not self.num_inflight_steps[req_index], f"row {req_index} has a step in flight"
        self.num_computed_tokens[req_index] = self.num_cached_tokens[req_index] = num_tokens

    def free(self, request: RequestState) -> None:
        self._requests[request.req_index] = None
        for rows in (self.have_images, self.returns_routing, self.replays_routing):
            rows.discard(request.req_index)
        self._free.append(request.req_index)
        request.req_index = NO_ROW

    def request(self, req_index: int) -> RequestState:
        request = self._requests[req_index]
        assert request is not None, f"row {req_index} belongs to nobody"
        return request

    def num_needed(self, req_indices: Int64) -> Int64:
        """Count the tokens to feed before the next can be sampled; 0 if no more will be."""
        num_tokens = self.num_tokens[req_indices]
        needed = num_tokens - self.num_computed_tokens[req_indices]
        return needed * (num_tokens < self.max_tokens[req_indices])

    def prefilling(self, req_indices: Int64, needed: Int64) -> Bool:
        computed = self.num_computed_tokens[req_indices]
        return (needed > 1) | (computed < self.num_prompt_tokens[req_indices])

    def future_token_index(self, req_indices: Int64) -> Int64:
        """Find the newest tokens in what the last step sampled; -1: in `last_token`."""
        in_flight = self.num_inflight_steps[req_indices] > 0
        return np.where(in_flight, self.last_sample_index[req_indices], -1)

    def launched(
        self, req_indices: Int64, sampled: Int64, decodes: Int64, seq_lens: Int32, num_drafts: int
    ) -> None:
        """Count a step: rows `sampled` get a token, and decodes among them perhaps their drafts."""
        self.num_inflight_steps[req_indices] += 1
        self.num_computed_tokens[req_indices] = seq_lens
        self.num_tokens[sampled] += 1
        self.num_tokens[decodes] += num_drafts
        self.last_sample_index[sampled] = np.arange(len(sampled))

    def committed(self, req_indices: Int64, query_lens: Int32) -> None:
        self.num_inflight_steps[req_indices] -= 1
        self.num_cached_tokens[req_indices] += query_lens

    def abandon(self, request: RequestState, num_again: int) -> None:
        """Forget a request's steps in flight; its last num_again tokens at least are fed again.

        A recurrent state is that of the last row written, and of no row before it: where a step in
        flight may have written, or rows are fed again, the request begins anew.
        """
        index = request.req_index
        written = int(self.num_cached_tokens[index])
        cached = max(0, min(written, request.num_tokens - num_again))
        if self.keeps_state and (self.num_inflight_steps[index] or cached < written):
            cached = 0
        self.num_inflight_steps[index] = 0
        self.num_tokens[index] = request.num_tokens
        self.num_computed_tokens[index] = self.num_cached_tokens[index] = cached
        (self.last_token[index],) = request.tokens(request.num_tokens - 1, request.num_tokens)
        self.last_sample_index[index] = -1

    def set_last_tokens(self, sampled: Int64, token_ids: tuple[int, ...]) -> None:
        self.last_token[sampled] = token_ids

    def rewind(self, req_indices: Int64, num_rejected: Int64) -> None:
        self.num_tokens[req_indices] -= num_rejected
        self.num_computed_tokens[req_indices] -= num_rejected
        self.num_cached_tokens[req_indices] -= num_rejected
