"""AsyncEngine: the public API for programs that run on asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from types import TracebackType

from dp_runtime.config import EngineConfig
from dp_runtime.core.rank_events.kv_events import KvEventBatch
from dp_runtime.core.request import Prompt, RequestOutput
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.async_handle import AsyncRequestHandle, AsyncRequestStream, deliver_in_loops
from dp_runtime.engine.core import EngineCore
from dp_runtime.engine.inputs import NewRequest, checked_requests, checked_seconds
from dp_runtime.engine.request_log import tokens_of
from dp_runtime.flight.record import FlightDump
from dp_runtime.metrics.recording import Recording
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.text.tokenizer import Tokenizer


class AsyncEngine:
    """Serves a model as `Engine` does, to any number of tasks and without a thread for each.

    Making it starts the ranks and blocks: `await asyncio.to_thread(AsyncEngine, config)` does so
    beside a running event loop. Requests belong to the loop that submits them.
    Raises ValueError for a configuration mistake, StartError if the ranks can't be started.
    """

    def __init__(self, config: EngineConfig, show_progress: bool = False) -> None:
        self._core = EngineCore(config, show_progress, deliver_in_loops)

    @property
    def config(self) -> EngineConfig:
        return self._core.config

    @property
    def model(self) -> ModelInfo:
        return self._core.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._core.tokenizer

    @property
    def num_unfinished(self) -> int:
        return self._core.num_unfinished

    @property
    def has_failed(self) -> bool:
        """Whether ranks were lost for good; else those that do not serve are soon back."""
        return self._core.has_failed

    def check_place(self) -> None:
        """Raise EngineOverloaded if a request that is submitted now would find no place."""
        self._core.check_place()

    async def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        dp_ranks: Sequence[int | None] | None = None,
    ) -> list[RequestOutput]:
        """Finish all prompts and return their outputs in order; cancellation aborts them.

        `params` are for all or one per prompt; `dp_ranks` pins prompts to ranks. All prompts are
        checked before any is submitted (ValueError).
        """
        self._core.check_open()
        handles: list[AsyncRequestHandle] = []
        try:
            for new in self._core.factory.make_all(prompts, params, dp_ranks):
                handles.append(await self._placed(new))
            return [await handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.abort()

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, dp_rank: int | None = None
    ) -> AsyncRequestStream:
        """Start a prompt as `submit` does, and iterate over its deltas; leaving early aborts it."""
        return AsyncRequestStream(self.submit(prompt, params, dp_rank))

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, dp_rank: int | None = None
    ) -> AsyncRequestHandle:
        """Start one prompt; ValueError for a mistake, else EngineOverloaded if it is full."""
        return self.submit_all([self.checked(prompt, params, dp_rank)])[0]

    def checked(
        self, prompt: Prompt, params: SamplingParams | None = None, dp_rank: int | None = None
    ) -> NewRequest:
        """Check a prompt and make its request, which `submit_all` starts; for any thread."""
        self._core.check_open()
        return self._core.factory.make(prompt, params, dp_rank)

    def submit_all(self, requests: Sequence[NewRequest]) -> list[AsyncRequestHandle]:
        """Start all of them or, raising EngineOverloaded, none; they share one event of news."""
        handles: list[AsyncRequestHandle] = []
        sink_of = partial(AsyncRequestHandle, news=asyncio.Event())
        try:
            for new in checked_requests(requests):
                handles.append(self._core.start(new, sink_of))
        except BaseException:
            for handle in handles:
                handle.abort()
            raise
        return handles

    @property
    def dp_ranks(self) -> tuple[int, ...]:
        """The ranks that serve now."""
        return self._core.members.dp_ranks

    @property
    def num_standbys(self) -> int:
        """Warm processes (`standby_ranks`) that can take the place of a lost rank now."""
        return self._core.num_standbys

    async def resize(self, dp_size: int) -> tuple[int, ...]:
        """As `Engine.resize`; cancellation does not undo it."""
        return (await asyncio.to_thread(self._core.changes.resize, dp_size)).dp_ranks

    async def drain(self, dp_rank: int, timeout_s: float = 0.0) -> tuple[int, ...]:
        """As `Engine.drain`; cancellation does not undo it."""
        return (await asyncio.to_thread(self._core.changes.drain, dp_rank, timeout_s)).dp_ranks

    async def step_trace(self) -> tuple[StepTrace, ...]:
        return await asyncio.to_thread(self._core.step_trace)

    async def recording(self, handles: Iterable[AsyncRequestHandle] = ()) -> Recording:
        """As `Engine.recording`."""
        steps, kept = await self.step_trace(), tokens_of(handles)
        return Recording.of(asdict(self.config), self.model, steps, kept)

    async def report(self) -> Report:
        return await asyncio.to_thread(self._core.report)

    async def metrics(self, timeout_s: float = 1.0) -> tuple[RankSnapshot, ...]:
        """Return what each rank has done, or had when it last answered; until it is closed."""
        return await asyncio.to_thread(self._core.metrics, timeout_s)

    async def kv_events(self, timeout_s: float = 0.0) -> tuple[KvEventBatch, ...]:
        """As `Engine.kv_events`; who is cancelled leaves the changes to the next call."""
        seconds = checked_seconds("timeout_s", timeout_s)
        await asyncio.to_thread(self._core.kv_events.wait, seconds)
        return self._core.kv_events.take(0.0)

    def kv_events_now(self, timeout_s: float) -> tuple[KvEventBatch, ...]:
        """As `Engine.kv_events`, in a thread that may wait."""
        return self._core.kv_events.take(checked_seconds("timeout_s", timeout_s))

    async def health(self, timeout_s: float = 5.0) -> tuple[RankHealth, ...]:
        """Return the state of every rank; also after a failure, until the engine is closed."""
        return await asyncio.to_thread(self._core.health, timeout_s)

    async def flight_record(self) -> FlightDump:
        """Return the last steps of every rank, also of those that hang; as `health`, any time."""
        return await asyncio.to_thread(self._core.flight_record)

    async def close(self) -> None:
        """Stop all ranks; unfinished requests fail with EngineClosed."""
        await asyncio.to_thread(self.close_now)

    def close_now(self) -> None:
        """Close the engine from a thread that may wait."""
        self._core.close()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def _placed(self, new: NewRequest) -> AsyncRequestHandle:
        """Start a request once it has a place, in the same order as callers of an Engine."""
        place = self._core.wait_for_place(new)
        try:
            async with asyncio.timeout(new.seconds_left):
                await asyncio.wrap_future(place.rank)
        except TimeoutError:
            pass  # it ends as soon as it has begun
        except BaseException:
            self._core.give_back(place)
            raise
        sink_of = partial(AsyncRequestHandle, news=asyncio.Event())
        return self._core.start_at(place, new, sink_of)
