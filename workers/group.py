"""WorkerGroup: the ranks of an engine, through one small handle per rank."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from enum import IntEnum
from time import monotonic
from typing import Protocol, TypeVar

from collectives.shared_memory.rendezvous import remove_rendezvous
from dp_runtime.config import EngineConfig
from dp_runtime.core.request import FailureListener, RankRequest, UpdateListener
from dp_runtime.errors import RankFailed
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.status import ModelInfo, RankHealth, RankState
from dp_runtime.metrics.trace import StepTrace, Totals
from dp_runtime.parallel.transports import Transport, choose_transport
from workers.messages import (
    Abandon,
    Abort,
    AnyRendezvous,
    HostInfo,
    Join,
    Load,
    Message,
    OpenRendezvous,
    Poll,
    Prepare,
    ReadHealth,
    ReadTotals,
    ReadTrace,
    Rendezvous,
    Stop,
    Submit,
)
from workers.start_errors import raise_failures

_log = logging.getLogger(__name__)

POLL_S = 1.0
STATUS_S = 5.0
STOP_S = 12.0

Answer = TypeVar("Answer")


class RankHandle(Protocol):
    dp_rank: int

    def call(self, message: Message[Answer]) -> Future[Answer]:
        """Send a message; its answer, or RankFailed if the rank's process ends first."""

    def kill(self) -> None:
        """End the rank at once; callable more than once."""


class Phase(IntEnum):
    """How far a group is; it never goes back."""

    STARTING = 0
    SERVING = 1
    FAILED = 2
    CLOSED = 3


@dataclass(frozen=True)
class GroupState:
    phase: Phase = Phase.STARTING
    epoch: int = 0
    rendezvous: AnyRendezvous | None = None  # of the epoch


class WorkerGroup:
    model: ModelInfo

    def __init__(
        self,
        config: EngineConfig,
        handles: Sequence[RankHandle],
        release: Callable[[], None],
        rendezvous: AnyRendezvous | None = None,
    ) -> None:
        """Take over the handles; `rendezvous` is for ranks that can not open one themselves."""
        self._config = config
        self._handles = handles
        self._release = release
        self._lock = threading.Lock()
        self._state = GroupState(rendezvous=rendezvous)
        self._pollers: list[threading.Thread] = []

    def start(self, show_progress: bool) -> None:
        """Bring all ranks to ready; on any failure none of them is left.

        Raises ValueError if the config or the model is at fault, else StartError.
        """
        try:
            deadline = monotonic() + self._config.start_timeout_s
            hosts = self._all(Prepare(), deadline)
            with ProgressBar("load", 0, "byte", show_progress) as bar:
                self.model = self._all(Load(), deadline, lambda: show_loading(bar, self.health()))[
                    0
                ]
            rendezvous = self._meet(hosts, deadline)
            with ProgressBar("capture", 0, "graph", show_progress) as bar:
                join = Join(rendezvous, self._state.epoch)
                self._all(join, deadline, lambda: show_capture(bar, self.health()))
            self._advance(Phase.SERVING)
        except BaseException:
            self._end()
            raise

    def listen(self, on_progress: UpdateListener, on_failure: FailureListener) -> None:

        def fail(error: BaseException) -> None:
            if self._advance(Phase.FAILED):
                on_failure(error)
                for handle in self._handles:
                    handle.call(Abandon(str(error)))

        for handle in self._handles:
            thread = threading.Thread(
                target=self._poll, args=(handle, on_progress, fail), daemon=True
            )
            thread.start()
            self._pollers.append(thread)

    def submit(self, dp_rank: int, requests: Sequence[RankRequest]) -> None:
        self._handles[dp_rank].call(Submit(requests))

    def abort(self, dp_rank: int, request_ids: Sequence[int]) -> None:
        self._handles[dp_rank].call(Abort(request_ids))

    def health(self) -> tuple[RankHealth, ...]:
        futures = [handle.call(ReadHealth()) for handle in self._handles]
        wait(futures, STATUS_S)
        return tuple(_health_of(rank, future) for rank, future in enumerate(futures))

    def trace(self) -> tuple[StepTrace, ...]:
        ranks = self._all(ReadTrace(), monotonic() + STATUS_S)
        steps = [step for rank in ranks for step in rank]
        return tuple(sorted(steps, key=lambda step: (step.step_id, step.dp_rank)))

    def totals(self) -> tuple[Totals, ...]:
        return tuple(self._all(ReadTotals(), monotonic() + STATUS_S))

    def close(self) -> None:
        before = self._state.phase
        if not self._advance(Phase.CLOSED):
            return
        try:
            if before < Phase.FAILED:  # else there is no step that they could end together
                wait([handle.call(Stop()) for handle in self._handles], STOP_S)
        finally:
            self._end()

    def _advance(self, phase: Phase) -> bool:
        """Enter a later phase; False if the group is in that phase, or a later one, already."""
        with self._lock:
            later = phase > self._state.phase
            if later:
                self._state = replace(self._state, phase=phase)
            return later

    def _meet(self, hosts: Sequence[HostInfo], deadline: float) -> AnyRendezvous:
        if self._state.rendezvous is None:
            one_host = len({host.host for host in hosts}) == 1
            opening = OpenRendezvous(transport_of(self._config, hosts).name, one_host)
            rendezvous = self._all(opening, deadline, handles=self._handles[:1])[0]
            _log.info("ranks on %s meet over %s at %s", *_where(hosts, rendezvous))
            self._state = replace(self._state, rendezvous=rendezvous)
        assert self._state.rendezvous is not None, "it was given, or opened just now"
        return self._state.rendezvous

    def _end(self) -> None:
        self._advance(Phase.CLOSED)
        for handle in self._handles:
            handle.kill()
        for poller in self._pollers:  # else the last user of the engine may be a daemon at exit
            poller.join(POLL_S)
        met = self._state.rendezvous
        if isinstance(met, Rendezvous) and met.in_host_memory:
            remove_rendezvous(met.address)  # a rank that was killed as it attached could not
        self._release()

    def _poll(
        self, handle: RankHandle, on_progress: UpdateListener, on_failure: FailureListener
    ) -> None:
        while self._state.phase is not Phase.CLOSED:
            try:
                polled = handle.call(Poll(POLL_S)).result()
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
        self,
        message: Message[Answer],
        deadline: float,
        show: Callable[[], None] = lambda: None,
        handles: Sequence[RankHandle] = (),
    ) -> list[Answer]:
        """Send a message to all ranks; the first failures are one error that names the ranks."""
        futures = [handle.call(message) for handle in handles or self._handles]
        while not all(future.done() for future in futures) and monotonic() <= deadline:
            done, _ = wait(futures, 0.2, FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                wait(futures, 1.0)  # ranks with the same trouble are named together
                break
            show()
        raise_failures(message.name, futures)
        return [future.result() for future in futures]


def transport_of(config: EngineConfig, hosts: Sequence[HostInfo]) -> Transport:
    """Choose how ranks on these hosts meet; ValueError if the config's way needs one host."""
    names = sorted({host.host for host in hosts})
    transport = choose_transport(
        config.collective,
        config.device,
        threads=config.launcher == "thread",
        shared_gpus=config.device == "cuda" and config.ranks_per_gpu > 1,
        one_host=len(names) == 1,
    )
    if len(names) > 1 and not transport.spans_hosts:
        raise ValueError(f"collective: {transport.name!r} is not allowed; ranks are on {names}")
    return transport


def _where(hosts: Sequence[HostInfo], met: Rendezvous) -> tuple[str, str, str]:
    return ", ".join(sorted({host.host for host in hosts})), met.transport, met.address


def show_loading(bar: ProgressBar, ranks: Sequence[RankHealth]) -> None:
    """Show how much is read, and the kernels: ranks build the same ones and share the files."""
    total = max(rank.kernels_total for rank in ranks)
    built = min(rank.kernels_built for rank in ranks)
    loaded = sum(rank.bytes_loaded for rank in ranks)
    kernels = f"kernels {built}/{total}" if total else ""
    bar.update(loaded, sum(rank.bytes_total for rank in ranks), kernels)


def show_capture(bar: ProgressBar, ranks: Sequence[RankHealth]) -> None:
    captured = min(rank.graphs_captured for rank in ranks)
    bar.update(captured, max(rank.graphs_total for rank in ranks))


def _health_of(dp_rank: int, future: Future[RankHealth]) -> RankHealth:
    if not future.done():
        return RankHealth(dp_rank, RankState.UNREACHABLE, error="does not answer")
    error = future.exception()
    if error is not None:
        return RankHealth(dp_rank, RankState.UNREACHABLE, error=str(error))
    return future.result()
