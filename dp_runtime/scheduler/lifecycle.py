"""RequestLifecycle: the one place where requests of a rank change their status."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from math import inf
from time import perf_counter

import numpy as np

from dp_runtime.core.batch import Int64
from dp_runtime.core.per_request_state import PerRequestState
from dp_runtime.core.request import FinishReason, RequestUpdate
from dp_runtime.scheduler.request_state import NO_ROW, RequestState, RequestStatus
from dp_runtime.scheduler.request_table import RequestTable


class RequestLifecycle:
    """The requests of a rank: in the queue, running, or leaving their rows.

    A request that stops running keeps its row, and every state that hangs on it, until no launched
    step has tokens of it: steps in flight write its pages and read its states.
    """

    def __init__(self, table: RequestTable, states: Sequence[PerRequestState]) -> None:
        self.table = table
        self.states = states
        self.waiting: deque[RequestState] = deque()  # by turn, then in the order of arrival
        self.running: Int64 = np.zeros(0, np.int64)  # rows of the table in the order of admission
        self._requests: dict[int, RequestState] = {}  # by request id, until they have ended
        self._leaving: list[RequestState] = []  # preempted or stopping
        self._waiting_tokens = 0
        self._queue_times: list[float] = []

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: int) -> RequestState | None:
        return self._requests.get(request_id)

    @property
    def num_queued_tokens(self) -> int:
        preempted = [r for r in self._leaving if r.status is RequestStatus.PREEMPTED]
        return self._waiting_tokens + sum(request.num_tokens for request in preempted)

    def add(self, request: RequestState) -> None:
        assert request.request_id not in self._requests, f"request {request.request_id} twice"
        self._requests[request.request_id] = request
        insort(self.waiting, request, key=lambda queued: queued.turn)
        self._waiting_tokens += request.num_tokens

    def finish(self, request: RequestState, reason: FinishReason) -> None:
        request.finish_reason = reason
        self.transition(request, RequestStatus.STOPPING)

    def recall(self, request_id: int) -> RequestUpdate:
        request = self.get(request_id)
        waits = request is not None and request.status is RequestStatus.WAITING
        if request is None or not waits or request.queued_at is None:
            return RequestUpdate(request_id, 0, given_back=False)
        self.transition(request, RequestStatus.STOPPING)
        self.settle()
        return RequestUpdate(request_id, len(request.outputs), given_back=True)

    def transition(self, request: RequestState, status: RequestStatus) -> None:
        """Change a request's status, and with it the queue, the running requests and its row.

        What a state raises as it begins a request leaves everything as it was.
        """
        before = request.status
        assert status in before.successors, f"request {request.request_id}: {before} -> {status}"
        if status is RequestStatus.RUNNING:
            self._take_row(request)
        request.status = status
        if before is RequestStatus.RUNNING:
            self.running = self.running[self.running != request.req_index]
        if before is RequestStatus.WAITING:
            self._waiting_tokens -= request.num_tokens
        if before.is_queued and not status.is_queued:
            self.waiting.remove(request)
        match status:
            case RequestStatus.RUNNING:
                self.running = np.append(self.running, request.req_index)
                self._end_queueing(request)
            case RequestStatus.PREEMPTED:
                request.turn = -inf
                self.waiting.appendleft(request)
                self._leaving.append(request)
            case RequestStatus.STOPPING if before is not RequestStatus.PREEMPTED:
                self._leaving.append(request)
            case RequestStatus.WAITING:
                self._release_row(request)
                self._waiting_tokens += request.num_tokens
            case RequestStatus.ENDED:
                self._release_row(request)
                del self._requests[request.request_id]

    def take_queue_times(self) -> list[float]:
        """Return the seconds in the queue of each request that has begun since the last call."""
        times, self._queue_times = self._queue_times, []
        return times

    def settle(self) -> None:
        """Take the rows of requests that stopped running and have no step in flight any more.

        NOTE: never within a commit, for all requests of the step still need their rows.
        """
        in_flight = self.table.num_inflight_steps
        for request in self._leaving[:]:
            if request.req_index == NO_ROW or not in_flight[request.req_index]:
                self._leaving.remove(request)
                preempted = request.status is RequestStatus.PREEMPTED
                self.transition(
                    request, RequestStatus.WAITING if preempted else RequestStatus.ENDED
                )

    def check(self) -> None:
        taken = self.table.req_indices
        for state in self.states:
            state.check(taken)
        assert {*self.running.tolist()} <= {*taken}, "a running request has no row"
        in_turn = all(one.turn <= other.turn for one, other in pairwise(self.waiting))
        assert in_turn, f"out of turn: {[request.request_id for request in self.waiting]}"
        queued = sum(request.num_tokens for request in self.waiting)
        assert queued == self.num_queued_tokens, f"{queued} tokens, not {self.num_queued_tokens}"
        for request in self._requests.values():
            assert request.status.is_queued == (request in self.waiting), f"{request.status}"
            has_row = request.status is not RequestStatus.WAITING
            assert has_row == (request.req_index != NO_ROW), f"{request.status}"

    def _end_queueing(self, request: RequestState) -> None:
        if request.queued_at is not None:  # else it was preempted
            self._queue_times.append(perf_counter() - request.queued_at)
            request.queued_at = None

    def _take_row(self, request: RequestState) -> None:
        req_index = self.table.take(request)
        begun: list[PerRequestState] = []
        try:
            for state in self.states:
                state.add(req_index, request.request, request.outputs)
                begun.append(state)
        except Exception:
            for state in begun:
                state.remove(req_index)
            self.table.free(request)
            raise

    def _release_row(self, request: RequestState) -> None:
        if request.req_index != NO_ROW:
            for state in self.states:
                state.remove(request.req_index)
            self.table.free(request)
