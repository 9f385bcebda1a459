"""Engine: the public API."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType

from dp_runtime.config import EngineConfig
from dp_runtime.core.request import Prompt, RankRequest, RequestOutput, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.admission import LOAD_BALANCERS, Admission
from dp_runtime.engine.handle import RequestHandle, RequestStream
from dp_runtime.engine.inputs import RequestFactory
from dp_runtime.engine.lifetime import EngineInChild, bind_lifetime, weakly
from dp_runtime.engine.output_processor import OutputProcessor
from dp_runtime.engine.rank_group import start_ranks
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.engine.tokenizer import Tokenizer
from dp_runtime.errors import EngineClosed, RankFailed, RequestFailed, is_int, require
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.status import ModelInfo, RankHealth
from dp_runtime.metrics.trace import Report, StepTrace

logger = logging.getLogger(__name__)


class Engine:
    """Serves a model over `config.dp_size` ranks; use it as a context manager.

    Raises ValueError for a configuration mistake, StartError if the ranks can't be started.
    """

    def __init__(self, config: EngineConfig, show_progress: bool = False) -> None:
        ok, allowed = isinstance(config, EngineConfig), "an EngineConfig, as EngineConfig('path')"
        require(ok, "config", config, allowed)
        self.config = config
        self._group = start_ranks(config, show_progress)
        model = self._group.model
        try:
            self.tokenizer = Tokenizer(model.tokenizer_json) if model.tokenizer_json else None
        except BaseException:
            self._group.close()
            raise
        self._factory = RequestFactory(model, self.tokenizer, config.seed)
        balancer = LOAD_BALANCERS[config.routing]()
        self._admission = Admission(balancer, config.dp_size, config.max_queued_requests)
        self._outputs = OutputProcessor()
        self._ids = itertools.count()
        self._lock = threading.Lock()
        self._closed: BaseException | None = None
        self._clock = BusyClock()
        self._num_finished = 0
        self._group.listen(weakly(self._on_updates), weakly(self._on_failure))
        bind_lifetime(self, self._group)
        logger.info(
            "%s on %d ranks (%s): requests go by %s, at most %d are unfinished, %d tokens at most",
            model.architecture, config.dp_size, config.launcher, config.routing,
            config.max_queued_requests, model.max_model_len,
        )  # fmt: skip

    @property
    def model(self) -> ModelInfo:
        return self._group.model

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
        this and all earlier ones are finished; if the engine fails, all that are finished.
        """
        requests = self._make_all(prompts, params, dp_ranks)
        handles: list[RequestHandle] = []
        outputs: list[RequestOutput] = []
        with ProgressBar("generate", len(requests), "request", show_progress) as progress:

            def take() -> None:
                outputs.append(handles[len(outputs)].result())
                if on_output is not None:
                    on_output(len(outputs) - 1, outputs[-1])
                progress.update(len(outputs))

            try:
                for request, rank in requests:
                    handles.append(self._start(request, rank))
                    while len(outputs) < len(handles) and handles[len(outputs)].done:
                        take()
                while len(outputs) < len(handles):
                    take()
            except (RankFailed, RequestFailed, EngineClosed, KeyboardInterrupt):
                if on_output is not None:
                    _deliver_finished(handles[len(outputs) :], len(outputs), on_output)
                raise
            finally:
                for handle in handles[len(outputs) :]:
                    handle.abort()
        return outputs

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, dp_rank: int | None = None
    ) -> RequestStream:
        """Start a prompt as `submit` does, and iterate over its deltas; leaving early aborts it."""
        return RequestStream(self.submit(prompt, params, dp_rank))

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, dp_rank: int | None = None
    ) -> RequestHandle:
        """Start one prompt; ValueError for a mistake, QueueFull above max_queued_requests."""
        request = self._make(prompt, params or SamplingParams())
        self._check_rank(dp_rank)
        return self._start(request, dp_rank, wait=False)

    def step_trace(self) -> tuple[StepTrace, ...]:
        """Return the steps that the ranks remember, with their rows and times."""
        self._check_open()
        return self._group.trace()

    def report(self) -> Report:
        self._check_open()
        return Report.from_totals(self._group.totals(), self._num_finished, self._clock.elapsed_s)

    def health(self) -> tuple[RankHealth, ...]:
        """Return the state of every rank; also after a failure, until the engine is closed."""
        if isinstance(self._closed, EngineClosed):
            raise self._closed
        return self._group.health()

    def close(self) -> None:
        """Stop all ranks; unfinished requests fail with EngineClosed."""
        if isinstance(self._closed, EngineInChild):
            return
        self._end(EngineClosed("the engine is closed"))
        self._group.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _make(self, prompt: Prompt, params: SamplingParams) -> RankRequest:
        self._check_open()
        return self._factory.make(next(self._ids), prompt, params)

    def _make_all(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        dp_ranks: Sequence[int | None] | None,
    ) -> list[tuple[RankRequest, int | None]]:
        ok = isinstance(prompts, Sequence) and not isinstance(prompts, str)
        require(ok, "prompts", prompts, "a list of prompts")
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        ranks = [None] * len(prompts) if dp_ranks is None else dp_ranks
        for name, values in (("params", params), ("dp_ranks", ranks)):
            ok = isinstance(values, Sequence) and len(values) == len(prompts)
            require(ok, name, values, f"a list with one entry per prompt ({len(prompts)})")
        requests = []
        for index, (prompt, one, rank) in enumerate(zip(prompts, params, ranks)):
            try:
                self._check_rank(rank)
                requests.append((self._make(prompt, one), rank))
            except ValueError as error:
                raise ValueError(f"prompts[{index}]: {error}") from None
        return requests

    def _check_rank(self, dp_rank: int | None) -> None:
        size = self.config.dp_size
        ok = dp_rank is None or (is_int(dp_rank) and 0 <= dp_rank < size)
        require(ok, "dp_rank", dp_rank, f"None or a rank in 0..{size - 1}")

    def _check_open(self) -> None:
        if self._closed:
            raise self._closed

    def _start(self, request: RankRequest, dp_rank: int | None, wait: bool = True) -> RequestHandle:
        tokens = len(request.prompt_token_ids) + request.params.max_tokens
        rank = self._admission.enter(tokens, dp_rank, wait)
        try:
            log = RequestLog(request, rank, self.tokenizer)
            handle = RequestHandle(log, self._abort)
            with self._lock:
                self._check_open()
                self._outputs.add(log, handle)
                self._clock.enter()
            self._group.submit(rank, [request])
        except BaseException:
            if self._outputs.remove(request.request_id):
                with self._lock:
                    self._clock.leave()
            self._admission.leave(rank, tokens)
            raise
        return handle

    def _abort(self, dp_rank: int, request_id: int) -> None:
        if request_id in self._outputs:
            self._group.abort(dp_rank, [request_id])

    def _on_updates(self, dp_rank: int, updates: Sequence[RequestUpdate]) -> None:
        deliveries = self._outputs.process(updates)
        if running := [each.log.request_id for each in deliveries if each.rank_goes_on]:
            self._group.abort(dp_rank, running)
        for delivery in deliveries:
            if delivery.ends:
                self._count_finished(delivery.log)
        for delivery in deliveries:
            delivery.deliver()

    def _count_finished(self, log: RequestLog) -> None:
        with self._lock:
            self._clock.leave()
            self._num_finished += 1
        self._admission.leave(log.dp_rank, log.num_reserved_tokens)

    def _on_failure(self, error: BaseException) -> None:
        logger.error("the engine has failed, and all its requests with it: %s", error)
        self._end(error)

    def disown(self, error: EngineInChild) -> None:
        self._closed = error
        self._lock = threading.Lock()
        self._outputs.disown(error)

    def _end(self, error: BaseException) -> None:
        with self._lock:
            self._closed = error
        self._admission.close(error)
        self._outputs.fail_all(error)


class BusyClock:
    """Adds up the time during which at least one request was unfinished."""

    def __init__(self) -> None:
        self._num_inside = 0
        self._since = 0.0
        self._elapsed_s = 0.0

    def enter(self) -> None:
        if self._num_inside == 0:
            self._since = monotonic()
        self._num_inside += 1

    def leave(self) -> None:
        self._num_inside -= 1
        if self._num_inside == 0:
            self._elapsed_s += monotonic() - self._since

    @property
    def elapsed_s(self) -> float:
        return self._elapsed_s + (monotonic() - self._since if self._num_inside else 0.0)


def _deliver_finished(
    handles: Sequence[RequestHandle],
    first_index: int,
    on_output: Callable[[int, RequestOutput], None],
) -> None:
    for index, handle in enumerate(handles, first_index):
        if handle.output is not None:
            on_output(index, handle.output)
