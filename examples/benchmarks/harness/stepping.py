"""Ranks whose step loop a benchmark drives itself: it sees every step, and may profile some."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from dp_runtime.config import EngineConfig
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import Pass
from dp_runtime.kernels.jit_build import KernelBuilds
from dp_runtime.layers.experts import Experts
from dp_runtime.layers.moe import MoeStage
from dp_runtime.layers.moe_kernels import MoeKernels
from dp_runtime.layers.moe_router import Router
from dp_runtime.metrics.totals import Recorder
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.parallel.buckets import GraphBuckets, PiecewiseBuckets
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.startup.build_rank import (
    assemble,
    load_rank,
    new_flight,
)
from dp_runtime.startup.graph_capture import MakeBuckets, capture_all, plan_capture
from dp_runtime.startup.jit_modules import jit_modules_of
from dp_runtime.startup.memory_profile import profile
from dp_runtime.startup.rank_plan import plan_rank
from examples.benchmarks.harness.kernel_profile import Profile, StepProfiler
from examples.benchmarks.harness.spawned import run_spawned
from workers.communicators import Communicator, connect
from workers.messages import Rendezvous

TOKENS = (100, 150_000)  # keeps clear of special tokens
IDS_A_RANK = 1_000_000
QUIET = 2  # a rank asks twice at most while a step runs that is not recorded yet

ATTACH_S = 300.0  # for the other ranks to load
OnCaptured = Callable[[int, int], None]


@dataclass(frozen=True)
class Load:
    """Requests of one rank that are all there from the start."""

    prompt_lens: tuple[int, ...]
    output_len: int

    def requests(self, first_id: int, vocab_size: int) -> Iterator[RankRequest]:
        rng = np.random.default_rng([first_id, len(self.prompt_lens)])
        params = SamplingParams(max_tokens=self.output_len, temperature=0.0, ignore_eos=True)
        low, high = min(TOKENS[0], vocab_size // 2), min(TOKENS[1], vocab_size)
        for number, length in enumerate(self.prompt_lens, first_id):
            prompt = tuple(rng.integers(low, high, length).tolist())
            yield RankRequest(number, prompt, params, number, frozenset())


@dataclass(frozen=True)
class Window:
    """Steps to profile: those after some in which the ranks had these rows."""

    rows: tuple[int, ...]  # [rank]
    after: int
    steps: int


@dataclass(eq=False)
class Driver:
    """Feeds one load to a rank's loop until it is done, and profiles some of its steps."""

    pending: list[RankRequest]
    recorder: Recorder
    window: Window | None = None
    unfinished: set[int] = field(init=False)
    last_tokens: dict[int, int] = field(default_factory=dict)
    profiler: StepProfiler | None = None
    _recorded: int = -1
    _quiet: int = 0  # times in a row that no step was recorded

    def __post_init__(self) -> None:
        self.unfinished = {request.request_id for request in self.pending}
        if self.window is not None:
            self.profiler = StepProfiler(self.window.after, self.window.steps)

    def take(self) -> Inbox:
        """What the loop asks before every step; a rank that had requests ends it for all.

        It does so once its own are done and no rank runs a step any more.
        """
        added, self.pending = self.pending, []
        if self.profiler is not None and self.recorder.steps:
            # Every rank sees the same steps, so all profile at the same time.
            self._count_in(self.profiler, self.recorder.steps[-1])
        before, self._recorded = self._recorded, self.recorder.totals.steps
        self._quiet = self._quiet + 1 if before == self._recorded else 0
        done = bool(self.last_tokens) and not self.unfinished
        return Inbox(added, stop=done and self._quiet >= QUIET)

    def deliver(self, progress: list[RequestUpdate]) -> None:
        for item in progress:
            self.last_tokens[item.request_id] = item.token_ids[-1]
            if item.finish_reason:
                self.unfinished.discard(item.request_id)

    def _count_in(self, profiler: StepProfiler, step: StepTrace) -> None:
        if self.window is not None and step.passes[0].real_rows == self.window.rows:
            profiler.count()


@dataclass(frozen=True)
class LoadResult:
    """What one rank saw of a load."""

    dp_rank: int
    steps: tuple[StepTrace, ...]
    last_tokens: dict[int, int]
    profile: Profile | None

    def steps_of(self, rows: Sequence[int]) -> list[float]:
        """Seconds between the starts of consecutive steps that all had these rows."""
        times = []
        for one, other in zip(self.steps, self.steps[1:]):
            if all(
                step.passes and step.passes[0].real_rows == tuple(rows) for step in (one, other)
            ):
                times.append(other.start_s - one.start_s)
        return times


class SteppedRank:
    """One rank, ready to step."""

    def __init__(self, dp_rank: int, config: EngineConfig, directory: str) -> None:
        self.dp_rank, self.config = dp_rank, config
        cuda = config.device == "cuda"
        device = torch.device(f"cuda:{dp_rank // config.ranks_per_gpu}" if cuda else "cpu")
        if cuda:
            torch.cuda.set_device(device)
        plan = plan_rank(config, dp_rank, str(device))
        builds = KernelBuilds(jit_modules_of(plan), device)
        with builds:
            loaded = load_rank(config, plan, lambda count: None)
            builds.wait()
        kind = config.collective
        kind = ("peer_to_peer" if cuda else "shared_memory") if kind == "auto" else kind
        meeting = Rendezvous(kind, directory)
        self.links: Communicator = connect(meeting, dp_rank, config, device, ATTACH_S)
        board, collective = self.links.board, self.links.collective
        self.loop: StepLoop = assemble(
            config, plan, loaded, board, collective, new_flight(config, plan)
        )
        if cuda:
            profile(self.loop, loaded)
        self._plan = plan
        if plan.graphs:
            self.capture()
        self._next_id = dp_rank * IDS_A_RANK
        self._vocab_size = plan.model.vocab_size

    def capture(self, buckets: MakeBuckets = GraphBuckets) -> None:
        """Capture graphs of these sizes, with all other ranks, in place of those there are."""
        told: OnCaptured = lambda done, total: None  # noqa: E731
        capture_all(self.loop, plan_capture(self._plan, self.loop, told, buckets))

    def run(self, load: Load, window: Window | None = None) -> LoadResult:
        """Serve a load; all ranks call it at the same time, and end it together."""
        before = len(self.loop.recorder.steps)
        requests = list(load.requests(self._next_id, self._vocab_size))
        self._next_id += len(requests)
        driver = Driver(requests, self.loop.recorder, window)
        with torch.inference_mode():
            self.loop.run(driver.take, driver.deliver)
        self.links.collective.barrier()
        steps = tuple(self.loop.recorder.steps)[before:]
        kernels = driver.profiler.profile if driver.profiler else None
        return LoadResult(self.dp_rank, steps, driver.last_tokens, kernels)

    @contextmanager
    def counting(self, rows: int) -> Iterator[list[Tensor]]:
        """Meanwhile steps are eager, and their stages of so many real rows count choices.

        Yields [(choices of every expert) of a stage].
        """
        counted: list[Tensor] = []
        coordinator, passes = self.loop.coordinator, self.loop.runner.passes
        target, execution = passes[Pass.TARGET], coordinator.execution

        def counts(stage: MoeStage) -> MoeStage:
            kernels = cast(MoeKernels, _Counting(stage.kernels, rows, counted))
            return replace(stage, kernels=kernels)

        with_counts = target.model.with_stages(counts)
        passes[Pass.TARGET] = replace(target, model=with_counts, graphs={})
        coordinator.execute_by(replace(execution, piecewise=PiecewiseBuckets()))
        yield counted
        passes[Pass.TARGET] = target
        coordinator.execute_by(execution)


@dataclass(frozen=True, eq=False)
class _Counting:
    """Experts' kernels that also count how often each expert is chosen."""

    kernels: MoeKernels
    rows: int
    counted: list[Tensor]

    def partial_sums(
        self,
        gathered: Tensor,
        plan: PaddingPlan,
        row_ranges: Tensor | None,
        router: Router,
        experts: Experts,
    ) -> Tensor:
        if plan.total_real == self.rows:
            real = plan.real_index
            rows = gathered if real is None else gathered[real.to(gathered.device)]
            choices = torch.bincount(router(rows)[1].flatten(), minlength=len(router.gate.weight))
            self.counted.append(choices.cpu())
        return self.kernels.partial_sums(gathered, plan, row_ranges, router, experts)

    def activation_bytes(
        self, gathered_rows: int, padded: bool, router: Router, experts: Experts
    ) -> int:
        return self.kernels.activation_bytes(gathered_rows, padded, router, experts)


@dataclass(frozen=True)
class Routed:
    """How evenly routing used the experts, over the layers of some decode steps."""

    active_experts: float  # of a layer, mean
    load: float  # the busiest rank's pairs over the mean rank's, mean over layers

    @classmethod
    def from_counts(cls, counted: Sequence[Tensor], dp_size: int) -> Routed:
        stages = torch.stack(list(counted)).float()
        ranks = torch.stack([part.sum(1) for part in stages.tensor_split(dp_size, 1)], 1)
        active = (stages > 0).sum(1).float().mean()
        return cls(float(active), float((ranks.amax(1) / ranks.mean(1)).mean()))


def run_ranks(config: EngineConfig, work: Callable[..., Any], *args: Any) -> list[Any]:
    """Call work(rank, *args) on a SteppedRank in a process per rank; what each returns, [rank].

    work: a function of a module.
    """
    parent = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=parent) as directory:
        run_spawned(_run_rank, config.dp_size, config, directory, work, args)
        files = [Path(directory, f"{rank}.pickle") for rank in range(config.dp_size)]
        return [pickle.loads(file.read_bytes()) for file in files]


def _run_rank(
    rank: int, config: EngineConfig, directory: str, work: Callable[..., Any],
    args: tuple[Any, ...], results: Any,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    stepped = SteppedRank(rank, config, f"{directory}/meeting")
    Path(directory, f"{rank}.pickle").write_bytes(pickle.dumps(work(stepped, *args)))
    if rank == 0:
        results.put(None)
    stepped.links.collective.barrier()
    stepped.links.close()
