"""Engine: the public API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from types import TracebackType

from dp_runtime.config import EngineConfig
from dp_runtime.core.rank_events.kv_events import KvEventBatch
from dp_runtime.core.request import Prompt, RequestOutput
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.core import EngineCore
from dp_runtime.engine.inputs import NewRequest, checked_flag, checked_seconds
from dp_runtime.engine.output_processor import deliver_here
from dp_runtime.engine.request_handle import RequestHandle, RequestStream
from dp_runtime.engine.request_log import tokens_of
from dp_runtime.errors import EngineClosed, RankFailed, RequestFailed, require
from dp_runtime.flight.record import FlightDump
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.recording import Recording
from dp_runtime.metrics.report import Report
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.text.tokenizer import Tokenizer


class Engine:
    """Serves a model over `config.dp_size` ranks; use it as a context manager.

    Raises ValueError for a configuration mistake, StartError if the ranks can't be started.
    """

    def __init__(self, config: EngineConfig, show_progress: bool = False) -> None:
        self._core = EngineCore(config, show_progress, deliver_here)

    @property
    def config(self) -> EngineConfig:
        return self._core.config

    @property
    def model(self) -> ModelInfo:
        return self._core.model

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._core.tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        dp_ranks: Sequence[int | None] | None = None,
        show_progress: bool = False,
        on_output: Callable[[int, RequestOutput], None] | None = None,
    ) -> list[RequestOutput]:
        """Finish all prompts and return their outputs in order.

        `params` are for all or one per prompt; `dp_ranks` pins prompts to ranks. All prompts are
        checked before any is submitted (ValueError). `on_output` gets index and output as soon as
        this and all earlier ones are finished; if the engine fails, all that are finished. Where
        a request fails (RequestFailed), it gets all others before that is raised.
        """
        ok = on_output is None or callable(on_output)
        require(ok, "on_output", on_output, "None or a function of index and output")
        shows = checked_flag("show_progress", show_progress)
        self._core.check_open()
        requests = self._core.factory.make_all(prompts, params, dp_ranks)
        with ProgressBar("generate", len(requests), "request", shows) as progress:
            batch = _Batch(on_output, progress)
            try:
                for request in requests:
                    batch.handles.append(self._placed(request))
                    batch.take_done()
                while batch.num_left:
                    batch.take()
            except (RankFailed, RequestFailed, EngineClosed, KeyboardInterrupt):
                batch.deliver_done()
                raise
            finally:
                batch.abort()
        batch.raise_failure()
        return batch.outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, dp_rank: int | None = None
    ) -> RequestStream:
        """Start a prompt as `submit` does, and iterate over its deltas; leaving early aborts it."""
        return RequestStream(self.submit(prompt, params, dp_rank))

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, dp_rank: int | None = None
    ) -> RequestHandle:
        """Start one prompt; ValueError for a mistake, else EngineOverloaded if it is full."""
        self._core.check_open()
        new = self._core.factory.make(prompt, params, dp_rank)
        return self._core.start(new, RequestHandle)

    @property
    def dp_ranks(self) -> tuple[int, ...]:
        """The ranks that serve now."""
        return self._core.members.dp_ranks

    @property
    def num_standbys(self) -> int:
        """Warm processes (`standby_ranks`) that can take the place of a lost rank now."""
        return self._core.num_standbys

    def resize(self, dp_size: int) -> tuple[int, ...]:
        """Serve with so many ranks from now on, and return them; no request is lost.

        New ranks, which load before anything changes, get the smallest free numbers; those with
        the largest leave. ValueError, or ResizeFailed without room: then nothing has changed.
        """
        return self._core.changes.resize(dp_size).dp_ranks

    def drain(self, dp_rank: int, timeout_s: float = 0.0) -> tuple[int, ...]:
        """Serve without a rank, and return the others; as `resize`, and no request is lost.

        The rank gets no new requests, and its own have `timeout_s` seconds to end there before
        they go on elsewhere, those that were pinned to it too.
        """
        return self._core.changes.drain(dp_rank, timeout_s).dp_ranks

    def step_trace(self) -> tuple[StepTrace, ...]:
        """Return the steps that the ranks remember, with their rows and times."""
        return self._core.step_trace()

    def recording(self, handles: Iterable[RequestHandle] = ()) -> Recording:
        """Return those steps with what a replay needs beside them (docs/experiments.md).

        handles: of requests whose prompts and outputs it is to have; else it has no text.
        """
        steps, kept = self.step_trace(), tokens_of(handles)
        return Recording.of(asdict(self.config), self.model, steps, kept)

    def report(self) -> Report:
        return self._core.report()

    def metrics(self, timeout_s: float = 1.0) -> tuple[RankSnapshot, ...]:
        """Return what each rank has done, or had when it last answered; until it is closed."""
        return self._core.metrics(timeout_s)

    def kv_events(self, timeout_s: float = 0.0) -> tuple[KvEventBatch, ...]:
        """Wait for changes of ranks' prefix caches, and return all since the last call.

        ValueError without `EngineConfig.kv_events`.
        """
        return self._core.kv_events.take(checked_seconds("timeout_s", timeout_s))

    def health(self, timeout_s: float = 5.0) -> tuple[RankHealth, ...]:
        """Return the state of every rank; also after a failure, until the engine is closed."""
        return self._core.health(timeout_s)

    def flight_record(self) -> FlightDump:
        """Return the last steps of every rank, also of those that hang; as `health`, any time."""
        return self._core.flight_record()

    def close(self) -> None:
        """Stop all ranks; unfinished requests fail with EngineClosed."""
        self._core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _placed(self, new: NewRequest) -> RequestHandle:
        """Start a request once it has a place."""
        place = self._core.wait_for_place(new)
        try:
            place.rank.result(new.seconds_left)
        except TimeoutError:
            pass  # it ends as soon as it has begun
        except BaseException:
            self._core.give_back(place)
            raise
        return self._core.start_at(place, new, RequestHandle)


class _Batch:
    """The requests of one call, whose outputs are taken in their order."""

    def __init__(
        self, on_output: Callable[[int, RequestOutput], None] | None, progress: ProgressBar
    ) -> None:
        self.handles: list[RequestHandle] = []
        self.outputs: list[RequestOutput] = []
        self._failures: list[RequestFailed] = []
        self._on_output, self._progress = on_output, progress

    @property
    def num_left(self) -> int:
        return len(self.handles) - self._num_taken

    @property
    def _num_taken(self) -> int:
        return len(self.outputs) + len(self._failures)

    def take(self) -> None:
        """Wait for the next; without `on_output` nobody gets the others where it fails."""
        index = self._num_taken
        try:
            self.outputs.append(self.handles[index].result())
        except RequestFailed as error:
            if self._on_output is None:
                raise
            self._failures.append(error)
        else:
            if self._on_output is not None:
                self._on_output(index, self.outputs[-1])
        self._progress.update(self._num_taken)

    def take_done(self) -> None:
        while self.num_left and self.handles[self._num_taken].done:
            self.take()

    def deliver_done(self) -> None:
        """Deliver what has ended, also behind what has not."""
        for index in range(self._num_taken, len(self.handles)):
            output = self.handles[index].output
            if output is not None and self._on_output is not None:
                self._on_output(index, output)

    def abort(self) -> None:
        for handle in self.handles[self._num_taken :]:
            handle.abort()

    def raise_failure(self) -> None:
        """Raise the first failure, with the number of others."""
        if self._failures:
            first, others = self._failures[0], len(self._failures) - 1
            raise RequestFailed(f"{first}; {others} more failed" if others else str(first))
