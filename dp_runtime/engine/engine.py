"""Engine: the public API."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from time import monotonic
from types import TracebackType

from dp_runtime.config import EngineConfig
from dp_runtime.core.request import Prompt, RequestOutput, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.engine.admission import Admission
from dp_runtime.engine.inputs import NewRequest, RequestFactory
from dp_runtime.engine.lifetime import EngineInChild, bind_lifetime, weakly
from dp_runtime.engine.load_balancer import LOAD_BALANCERS
from dp_runtime.engine.output_processor import OutputProcessor
from dp_runtime.engine.rank_group import start_ranks
from dp_runtime.engine.request_handle import RequestHandle, RequestStream
from dp_runtime.engine.request_log import RequestLog
from dp_runtime.engine.tokenizer import Tokenizer
from dp_runtime.errors import EngineClosed, RankFailed, RequestFailed, fresh, require
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
        self.config = config = config.copied()
        self._group = start_ranks(config, show_progress)
        model = self._group.model
        try:
            text = model.tokenizer_json
            self.tokenizer = None if text is None else Tokenizer(text)
        except BaseException:
            self._group.close()
            raise
        self._factory = RequestFactory(model, self.tokenizer, config.seed, config.dp_size)
        balancer = LOAD_BALANCERS[config.routing]()
        self._admission = Admission(balancer, config.dp_size, config.max_queued_requests)
        self._outputs = OutputProcessor()
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
        ok = on_output is None or callable(on_output)
        require(ok, "on_output", on_output, "None or a function of index and output")
        self._check_open()
        requests = self._factory.make_all(prompts, params, dp_ranks)
        handles: list[RequestHandle] = []
        outputs: list[RequestOutput] = []
        with ProgressBar("generate", len(requests), "request", show_progress) as progress:

            def take() -> None:
                outputs.append(handles[len(outputs)].result())
                if on_output is not None:
                    on_output(len(outputs) - 1, outputs[-1])
                progress.update(len(outputs))

            try:
                for request in requests:
                    handles.append(self._start(request))
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
        self._check_open()
        return self._start(self._factory.make(prompt, params, dp_rank), wait=False)

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
            raise fresh(self._closed)
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

    def _check_open(self) -> None:
        if self._closed is not None:
            raise fresh(self._closed)

    def _start(self, new: NewRequest, wait: bool = True) -> RequestHandle:
        tokens = new.request.num_reserved_tokens
        rank = self._admission.enter(tokens, new.dp_rank, wait)
        try:
            log = RequestLog(new.request, rank, self.tokenizer)
            handle = RequestHandle(log, self._abort)
            with self._lock:
                self._check_open()
                self._outputs.add(log, handle)
                self._clock.enter()
        except BaseException:
            self._admission.leave(rank, tokens)
            raise
        try:
            self._group.submit(rank, [new.request])
        except BaseException:
            if self._outputs.remove(log.request_id):  # else it was counted as it ended
                self._count_out(log)
            raise
        return handle

    def _abort(self, dp_rank: int, request_id: int) -> None:
        if request_id in self._outputs:
            self._group.abort(dp_rank, [request_id])

    def _on_updates(self, dp_rank: int, updates: Sequence[RequestUpdate]) -> None:
        deliveries = self._outputs.process(updates)
        if running := [each.log.request_id for each in deliveries if each.rank_goes_on]:
            self._group.abort(dp_rank, running)
        ended = [each.log for each in deliveries if each.ends]
        for log in ended:
            self._count_out(log)
        with self._lock:
            self._num_finished += len(ended)
        for delivery in deliveries:
            delivery.deliver()

    def _count_out(self, log: RequestLog) -> None:
        with self._lock:
            self._clock.leave()
        self._admission.leave(log.dp_rank, log.request.num_reserved_tokens)

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
        for log in self._outputs.fail_all(error):
            self._count_out(log)


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
