"""WorkerGroup: the ranks of an engine, behind one small handle per rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from time import monotonic
from typing import Any, Protocol

from collectives.shared_memory.group import new_rendezvous_path
from collectives.shared_memory.rendezvous import remove_rendezvous
from dp_runtime.config import EngineConfig
from dp_runtime.core.request import FailureListener, RankRequest, UpdateListener
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.status import ModelInfo, RankHealth, RankState
from dp_runtime.metrics.trace import StepTrace, Totals
from workers.messages import ONE_HOST, HostInfo, MeetingPoint, Polled

POLL_S = 1.0
STATUS_S = 5.0
STOP_S = 12.0


class RankHandle(Protocol):
    """A rank's process: calls methods of its Worker, and ends it."""

    dp_rank: int

    def call(self, method: str, *args: Any) -> Future[Any]:
        """Start a method of the Worker; RankFailed if its process ends first."""

    def kill(self) -> None:
        """End the process at once; callable more than once."""


class WorkerGroup:
    """Starts ranks behind handles, passes requests and outputs, watches them, ends them."""

    def __init__(
        self,
        config: EngineConfig,
        handles: Sequence[RankHandle],
        release: Callable[[], None],
        in_process_group: object = None,
    ) -> None:
        self._config = config
        self._handles = handles
        self._release = release
        self._in_process_group = in_process_group
        self._closing = threading.Event()
        self._failed = threading.Lock()  # taken by the first failure, for good
        self._pollers: list[threading.Thread] = []
        self._met: MeetingPoint | None = None
        self.model: ModelInfo

    def start(self, show_progress: bool) -> None:
        """Bring all ranks to ready; on any failure none of them is left.

        Raises ValueError if the config or the model is at fault, else StartError.
        """
        try:
            deadline = monotonic() + self._config.start_timeout_s
            hosts = self._all("prepare", deadline=deadline)
            with ProgressBar("load", 0, "byte", show_progress) as progress:
                self.model = self._all("load", deadline=deadline, progress=progress)[0]
            self._met = _meeting_point(self._config, hosts, self._in_process_group)
            with ProgressBar("capture", 0, "graph", show_progress) as progress:
                self._all("serve", self._met, deadline=deadline, progress=progress)
        except BaseException:
            self._end()
            raise

    def listen(self, on_progress: UpdateListener, on_failure: FailureListener) -> None:
        """Begin to deliver outputs, from one thread per rank."""

        def fail(error: BaseException) -> None:
            if not self._closing.is_set() and self._failed.acquire(blocking=False):
                on_failure(error)
                for handle in self._handles:
                    handle.call("abandon", str(error))

        for handle in self._handles:
            thread = threading.Thread(
                target=self._poll, args=(handle, on_progress, fail), daemon=True
            )
            thread.start()
            self._pollers.append(thread)

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        self._handles[dp_rank].call("submit", requests)

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self._handles[dp_rank].call("abort", request_ids)

    def health(self) -> tuple[RankHealth, ...]:
        futures = [handle.call("health") for handle in self._handles]
        wait(futures, STATUS_S)
        return tuple(_health_of(rank, future) for rank, future in enumerate(futures))

    def trace(self) -> tuple[StepTrace, ...]:
        ranks = self._all("trace", deadline=monotonic() + STATUS_S)
        steps = [step for rank in ranks for step in rank]
        return tuple(sorted(steps, key=lambda step: (step.step_id, step.dp_rank)))

    def totals(self) -> tuple[Totals, ...]:
        return tuple(self._all("totals", deadline=monotonic() + STATUS_S))

    def close(self) -> None:
        if self._closing.is_set():
            return
        self._closing.set()
        try:
            if not self._failed.locked():  # else there is no step that they could end together
                wait([handle.call("stop") for handle in self._handles], STOP_S)
        finally:
            self._end()

    def _end(self) -> None:
        self._closing.set()
        for handle in self._handles:
            handle.kill()
        for poller in self._pollers:  # else the last user of the engine may be a daemon at exit
            poller.join(POLL_S)
        if self._met is not None and self._met.in_host_memory:
            remove_rendezvous(self._met.address)  # a rank that was killed as it attached could not
        self._release()

    def _poll(
        self, handle: RankHandle, on_progress: UpdateListener, on_failure: FailureListener
    ) -> None:
        while not self._closing.is_set():
            try:
                polled: Polled = handle.call("poll", POLL_S).result()
                if polled.progress:
                    on_progress(handle.dp_rank, polled.progress)
                if polled.error:
                    on_failure(RankFailed(polled.error))
                    return
            except RankFailed as error:
                on_failure(error)
                return
            except Exception as error:
                on_failure(RankFailed(f"rank {handle.dp_rank}: {type(error).__name__}: {error}"))
                return

    def _all(
        self, method: str, *args: Any, deadline: float, progress: ProgressBar | None = None
    ) -> list[Any]:
        """Call a method on all ranks; the first failures are one error that names the ranks."""
        futures = [handle.call(method, *args) for handle in self._handles]
        while not all(future.done() for future in futures):
            done, _ = wait(futures, 0.2, FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                wait(futures, 1.0)  # ranks with the same trouble are named together
                break
            if monotonic() > deadline:
                break
            if progress is not None:
                _show(progress, method, self.health())
        _raise_failures(method, futures)
        return [future.result() for future in futures]


def _raise_failures(method: str, futures: Sequence[Future[Any]]) -> None:
    ranks: dict[tuple[type[BaseException], str], list[int]] = {}
    for rank, future in enumerate(futures):
        error = future.exception() if future.done() else None
        if error is not None:
            ranks.setdefault((type(error), str(error)), []).append(rank)
    if not ranks and all(future.done() for future in futures):
        return
    if not ranks:
        late = [rank for rank, future in enumerate(futures) if not future.done()]
        raise StartError(f"ranks {late} did not finish {method!r} in time")
    mistakes = {text: who for (kind, text), who in ranks.items() if issubclass(kind, ValueError)}
    if mistakes:
        raise ValueError("; ".join(_named(text, who, futures) for text, who in mistakes.items()))
    if any(kind in (StartError, RankFailed) for kind, _ in ranks):
        raise StartError("; ".join(text for _, text in ranks))  # such texts name their rank
    raise StartError(
        "; ".join(
            _named(f"{kind.__name__}: {text}", who, futures) for (kind, text), who in ranks.items()
        )
    )


def _named(text: str, ranks: list[int], futures: Sequence[Future[Any]]) -> str:
    """The error of some ranks; one that all of them have is no rank's own."""
    if len(ranks) == len(futures):
        return text
    return f"rank {', '.join(map(str, ranks))}: {text}"


def _show(progress: ProgressBar, method: str, states: Sequence[RankHealth]) -> None:
    """How far the ranks are: with loading, or with what comes before they serve."""
    if method == "serve":
        captured = min(rank.graphs_captured for rank in states)
        progress.update(captured, max(rank.graphs_total for rank in states))
        return
    loaded = sum(rank.bytes_loaded for rank in states)
    progress.update(loaded, sum(rank.bytes_total for rank in states), _kernels(states))


def _kernels(states: Sequence[RankHealth]) -> str:
    """How far the ranks are with their kernels; they build the same ones and share the files."""
    total = max(rank.kernels_total for rank in states)
    built = min(rank.kernels_built for rank in states)
    return f"kernels {built}/{total}" if total else ""


def _health_of(dp_rank: int, future: Future[Any]) -> RankHealth:
    if not future.done():
        return RankHealth(dp_rank, RankState.UNREACHABLE, error="does not answer")
    error = future.exception()
    if error is not None:
        return RankHealth(dp_rank, RankState.UNREACHABLE, error=str(error))
    health: RankHealth = future.result()
    return health


def _meeting_point(
    config: EngineConfig, hosts: Sequence[HostInfo], in_process_group: object
) -> MeetingPoint:
    """Where the ranks meet: shared memory on one host where no rank has a GPU of its own."""
    if in_process_group is not None:
        return MeetingPoint("in_process", "", in_process_group)
    one_host = len({host.host for host in hosts}) == 1
    share_gpus = config.device == "cuda" and config.ranks_per_gpu > 1  # NCCL would refuse
    kind = config.collective
    if kind == "auto":
        near = "peer_to_peer" if config.device == "cuda" else "shared_memory"
        kind = near if one_host else "torch_distributed"
        kind = "shared_memory" if share_gpus else kind
    first = hosts[0]
    if kind in ONE_HOST:
        if not one_host:
            names = sorted({host.host for host in hosts})
            raise ValueError(f"collective: {kind!r} is not allowed; ranks are on {names}")
        return MeetingPoint(kind, new_rendezvous_path(first.shared_directory))
    return MeetingPoint(kind, f"tcp://{first.address}:{first.free_port}")
