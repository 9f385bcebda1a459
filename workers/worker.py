"""Worker: one DP rank as a plain class. It owns device, pages, backend and collective."""

from __future__ import annotations

import gc
import os
import socket
import threading
from collections.abc import Sequence
from time import monotonic, sleep

import torch

from collectives.shared_memory.group import shared_root
from dp_runtime.config import EngineConfig
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.errors import CollectiveAborted
from dp_runtime.kernels.builds import KernelBuilds, forbid_compilation
from dp_runtime.metrics.memory import MemoryUse, RankMemory
from dp_runtime.metrics.status import GraphUse, ModelInfo, RankHealth, RankState
from dp_runtime.metrics.trace import StepTrace, Totals
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.startup.assembly import LoadedRank, assemble, kernels_of, load_rank, profile
from dp_runtime.startup.graph_capture import capture
from dp_runtime.startup.rank_plan import RankPlan, plan_rank
from workers.links import Communicator, connect
from workers.messages import HostInfo, MeetingPoint, Polled

LINGER_S = 0.002  # outputs that follow within this time travel together
STOP_S = 5.0


class Worker:
    """Prepares, starts and serves one rank; its step loop runs in a thread of its own.

    Call `prepare`, `load` and `serve` on all ranks, each once all have done the one before; then
    `submit`, `abort` and `poll`; `health`, `trace` and `totals` at any time; at the end `stop`, or
    `abandon` where a rank has failed.
    It runs in an actor, in a plain process or beside others in one, and knows of none of these.
    """

    def __init__(self, dp_rank: int, config: EngineConfig, device: str) -> None:
        self.dp_rank = dp_rank
        self.config = config
        self.device = device
        self._state = RankState.STARTING
        self._plan: RankPlan | None = None
        self._builds: KernelBuilds | None = None
        self._loaded: LoadedRank | None = None
        self._measured: MemoryUse | None = None
        self._links: Communicator | None = None
        self._loop: StepLoop | None = None
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._added: list[RankRequest] = []
        self._aborted: list[int] = []
        self._stopping = False
        self._outbox: list[RequestUpdate] = []
        self._error: str | None = None
        self._bytes_loaded = 0
        self._graphs = (0, 0)  # captured, of how many
        self._graph_use: GraphUse | None = None

    def prepare(self) -> HostInfo:
        """Check the model against the config, before anything is loaded (ValueError)."""
        if self.config.launcher != "thread":
            torch.set_num_threads(self.config.torch_threads or self._fair_threads())
        self._use_device()
        self._plan = plan_rank(self.config, self.dp_rank, self.device)
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        return HostInfo(self.dp_rank, socket.gethostname(), _own_address(), port, shared_root())

    def load(self) -> ModelInfo:
        """Read this rank's weights and build its kernels; ranks may take different times."""
        assert self._plan is not None, "prepare comes before load"
        plan, device = self._plan, torch.device(self.device)
        self._state = RankState.LOADING
        self._builds = KernelBuilds(kernels_of(plan), device)
        with self._builds:
            self._loaded = load_rank(self.config, plan, self._count_bytes)
            self._state = RankState.COMPILING
            self._builds.wait()
        self._state = RankState.READY
        return self._loaded.info

    def serve(self, meeting_point: MeetingPoint) -> None:
        """Join the other ranks and begin to step."""
        assert self._plan is not None, "prepare comes before serve"
        assert self._loaded is not None, "load comes before serve"
        self._links = connect(meeting_point, self.dp_rank, self.config, torch.device(self.device))
        board, collective = self._links.board, self._links.collective
        self._loop = assemble(self.config, self._plan, self._loaded, board, collective)
        if self.device != "cpu":
            self._measured = profile(self._loop, self._loaded)
        if self._plan.graphs:
            self._state = RankState.CAPTURING
            self._graph_use = capture(self._plan, self._loop, self._count_graphs)
        if self.config.launcher != "thread":
            gc.collect()
            gc.freeze()  # what was loaded lives as long as the rank: no step should walk over it
            if self.device != "cpu":
                forbid_compilation()
        self._state = RankState.RUNNING
        name = f"dp-rank-{self.dp_rank}"
        self._thread = threading.Thread(target=self._step, name=name, daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[RankRequest]) -> None:
        """Queue requests for the next step."""
        with self._changed:
            self._added += requests
        self._wake()

    def abort(self, request_ids: Sequence[int]) -> None:
        """End requests before the next step; ids that are done are ignored."""
        with self._changed:
            self._aborted += request_ids
        self._wake()

    def poll(self, timeout_s: float) -> Polled:
        """What was done since the last poll; waits for it up to timeout_s."""
        with self._changed:
            self._changed.wait_for(lambda: self._outbox or self._error or self._stopping, timeout_s)
            arrived = bool(self._outbox) and not self._error
        if arrived:
            sleep(LINGER_S)
        with self._changed:
            progress, self._outbox = self._outbox, []
            return Polled(progress, self._error)

    def health(self) -> RankHealth:
        """State and progress; cheap, and safe beside a running step."""
        loop, plan = self._loop, self._plan
        step, since = loop.last_finished if loop else (-1, monotonic())
        state = self._state
        if state is RankState.RUNNING and loop and loop.idle.is_set():
            state = RankState.IDLE
        return RankHealth(
            dp_rank=self.dp_rank,
            state=state,
            pid=os.getpid(),
            host=socket.gethostname(),
            epoch=loop.coordinator.epoch if loop else 0,
            last_step=step,
            last_step_age_s=monotonic() - since,
            free_pages=loop.scheduler.allocator.num_free if loop else 0,
            num_pages=plan.pages.num_pages if plan else 0,
            num_running=len(loop.scheduler.running) if loop else 0,
            num_queued=len(loop.scheduler.waiting) + len(self._added) if loop else 0,
            bytes_read=self._loaded.info.bytes_read if self._loaded else 0,
            bytes_loaded=self._bytes_loaded,
            bytes_total=plan.load_bytes if plan else 0,
            kernels_built=self._builds.num_built if self._builds else 0,
            kernels_total=self._builds.total if self._builds else 0,
            graphs_captured=self._graphs[0],
            graphs_total=self._graphs[1],
            load_s=self._loaded.load_s if self._loaded else 0.0,
            graphs=self._graph_use,
            memory=RankMemory(self.dp_rank, plan.memory, self._measured) if plan else None,
            error=self._error or "",
        )

    def trace(self) -> tuple[StepTrace, ...]:
        """The steps this rank remembers."""
        return tuple(self._loop.recorder.steps) if self._loop else ()

    def totals(self) -> Totals:
        """Sums over all steps of this rank."""
        return self._loop.recorder.totals if self._loop else Totals(self.dp_rank)

    def stop(self) -> None:
        """Leave the step loop together with the other ranks, or without them after STOP_S."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._wake()
        if self._thread is not None:
            self._thread.join(STOP_S)
            if self._thread.is_alive() and self._loop is not None:
                self._loop.coordinator.abort("it was told to stop")
                self._thread.join(STOP_S)
        if self._links is not None:
            self._links.close()
        self._state = RankState.STOPPED

    def abandon(self, reason: str) -> None:
        """Leave the step at once and free the ranks that wait in it; does not wait."""
        if self._links is not None:
            self._links.board.abort(reason)
            self._links.collective.abort(reason)

    def _step(self) -> None:
        assert self._loop is not None, "the loop exists before its thread"
        self._use_device()
        try:
            self._loop.run(self._take, self._deliver)
        except CollectiveAborted as error:
            self._fail(str(error))  # it says which rank ended the step, and why
        except Exception as error:
            self._fail(f"rank {self.dp_rank}: {type(error).__name__}: {error}")

    def _fail(self, error: str) -> None:
        with self._changed:
            self._state = RankState.FAILED
            self._error = error
            self._changed.notify_all()

    def _take(self) -> Inbox:
        with self._changed:
            commands = Inbox(self._added, self._aborted, self._stopping)
            self._added, self._aborted = [], []
            return commands

    def _deliver(self, progress: list[RequestUpdate]) -> None:
        if progress:
            with self._changed:
                self._outbox += progress
                self._changed.notify_all()

    def _wake(self) -> None:
        if self._links is not None:
            self._links.board.wake()

    def _count_graphs(self, done: int, total: int) -> None:
        self._graphs = (done, total)

    def _count_bytes(self, count: int) -> None:
        self._bytes_loaded += count

    def _use_device(self) -> None:
        """Make a GPU rank's device the current one of the calling thread."""
        if self.device != "cpu":
            torch.cuda.set_device(self.device)

    def _fair_threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // self.config.dp_size)


def _own_address() -> str:
    """The address other hosts reach this one by; loopback on a host without a network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # NOTE: sends nothing; it only picks the interface
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])
