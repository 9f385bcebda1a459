"""Ranks that do as they are told: an Engine's driver side without any model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.core.rank_events.listeners import Listeners
from dp_runtime.core.request import FinishReason, RankRequest, RequestUpdate
from dp_runtime.engine.engine import Engine
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.totals import Totals
from dp_runtime.metrics.trace import StepTrace
from workers.supervision.metrics_calls import MetricsCalls

VOCAB_SIZE, HIDDEN_SIZE, MAX_MODEL_LEN = 100, 4, 64
MODEL = ModelInfo("Fake", VOCAB_SIZE, HIDDEN_SIZE, MAX_MODEL_LEN, (7,), None, 1000, 0)


class FakeGroup:
    model = MODEL
    num_standbys = 0

    def __init__(self, dp_size: int) -> None:
        self.members = Membership.first(dp_size)
        self.wanted = self.members
        self.metrics = MetricsCalls(list)
        self.taken: dict[int, tuple[int, RankRequest]] = {}  # by request id: rank and request
        self.recalls: list[tuple[int, int]] = []  # rank and request, not answered yet
        self.refusal: BaseException | None = None  # raised by the next submit

    def listen(self, listeners: Listeners) -> None:
        self.on_progress, self.on_failure = listeners.on_progress, listeners.on_failure
        self.on_transition, self.on_load = listeners.on_transition, listeners.on_load
        self.on_kv_events = listeners.on_kv_events

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            raise refusal
        self.taken |= {request.request_id: (dp_rank, request) for request in requests}

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        for request_id in request_ids:
            self.end(request_id, finish_reason=FinishReason.ABORT)

    def recall(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self.recalls += [(dp_rank, request_id) for request_id in request_ids]

    def end(self, request_id: int, **how: Any) -> None:
        """Tell the engine that a request has ended; a rank tells it once."""
        if request_id in self.taken:
            rank, _ = self.taken.pop(request_id)
            self.on_progress(rank, [RequestUpdate(request_id, 0, **how)])

    def health(self, timeout_s: float) -> tuple[RankHealth, ...]:
        return ()

    def trace(self) -> tuple[StepTrace, ...]:
        return ()

    def totals(self) -> tuple[Totals, ...]:
        return ()

    def close(self) -> None: ...


@contextmanager
def fake_engine(**fields: Any) -> Iterator[tuple[Engine, FakeGroup]]:
    given: dict[str, Any] = {"dp_size": 2, "launcher": "thread"} | fields
    group = FakeGroup(given["dp_size"])
    with (
        patch("dp_runtime.engine.core.start_ranks", lambda *given: group),
        Engine(EngineConfig("fake", **given)) as engine,
    ):
        yield engine, group


def outstanding(engine: Engine) -> list[tuple[int, int]]:
    """Requests and tokens that the engine counts on each rank."""
    loads = engine._core._admission._loads
    return [(rank.requests, rank.tokens) for rank in loads._ranks.values()]
