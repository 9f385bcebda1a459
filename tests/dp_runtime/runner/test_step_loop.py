"""The step loop over several ranks and any program, with threads as ranks."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from time import sleep
from typing import Any

import pytest
import torch

from collectives.in_process import InProcessGroup
from dp_runtime.config import EngineConfig
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.core.step_program import Pass, Program
from dp_runtime.parallel.agreement import StepTotals
from dp_runtime.parallel.padding import PaddingPlan
from dp_runtime.parallel.padding_cost import measure_padding_cost
from dp_runtime.runner import step_loop
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.scheduler.scheduler_output import SchedulerOutput
from dp_runtime.startup.build_rank import assemble, load_rank, new_flight
from dp_runtime.startup.rank_plan import plan_rank
from tests.checkpoints import add_mtp, tiny_checkpoint
from tests.dp_runtime.runner.eager_graphs import captured_of

CPU = torch.device("cpu")
LAST_STEPS = 2  # without rows, once all requests are done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_mtp(tiny_checkpoint(tmp_path_factory.mktemp("step")))


class Rank:
    """A rank's loop with an inbox and the tokens it delivered."""

    def __init__(self, loop: StepLoop, num_requests: int, params: SamplingParams) -> None:
        self.loop = loop
        self.tokens: dict[int, list[int]] = {}
        self._inbox = [
            RankRequest(number, tuple(range(3, 8 + number)), params, 0, frozenset())
            for number in range(num_requests)
        ]
        self._finished = 0
        self._due = num_requests
        self.stop = threading.Event()
        self._steps_left = LAST_STEPS

    def take(self) -> Inbox:
        taken, self._inbox = self._inbox, []
        if self.stop.is_set():
            self._steps_left -= 1
        return Inbox(taken, (), stop=self._steps_left < 0)

    def deliver(self, items: list[RequestUpdate]) -> None:
        for item in items:
            self.tokens.setdefault(item.request_id, []).extend(item.token_ids)
            self._finished += item.finish_reason is not None

    @property
    def done(self) -> bool:
        return self._finished == self._due


def make_loop(config: EngineConfig, group: InProcessGroup, dp_rank: int) -> StepLoop:
    plan = plan_rank(config, dp_rank, "cpu")
    loaded = load_rank(config, plan, lambda count: None)
    board, collective = group.board(dp_rank), group.collective(dp_rank)
    return assemble(config, plan, loaded, board, collective, new_flight(config, plan))


def run_ranks(
    checkpoint: Path,
    loads: Sequence[int],
    policy: Callable[[StepTotals], int] = lambda totals: totals.program_id,
    prepare: Callable[[StepLoop], None] = lambda loop: None,
    params: Sequence[SamplingParams] | None = None,
    **fields: Any,
) -> list[Rank]:
    """Serve loads[rank] requests on every rank until all are done."""
    size = len(loads)
    config = EngineConfig(
        str(checkpoint), dp_size=size, launcher="thread", max_model_len=64, num_pages=40,
        poison_padding=True, **fields,
    )  # fmt: skip
    group = InProcessGroup(size, 20.0)

    def build(dp_rank: int) -> Rank:
        loop = make_loop(config, group, dp_rank)
        loop.coordinator.policy = policy
        prepare(loop)
        rank_params = params[dp_rank] if params else SamplingParams(max_tokens=6)
        return Rank(loop, loads[dp_rank], rank_params)

    ranks = [build(dp_rank) for dp_rank in range(size)]

    def deliver(rank: Rank, items: list[RequestUpdate]) -> None:
        rank.deliver(items)
        if all(other.done for other in ranks):
            ranks[0].stop.set()
            ranks[0].loop.coordinator.board.wake()

    with ThreadPoolExecutor(size) as pool:
        runs = [pool.submit(rank.loop.run, rank.take, partial(deliver, rank)) for rank in ranks]
        for run in runs:
            run.result(60)
    return ranks


@pytest.mark.parametrize("loads", [(3, 0, 1), (0, 0, 2)])
def test_a_program_of_many_passes_gives_the_same_tokens(
    checkpoint: Path, loads: tuple[int, ...]
) -> None:
    plain = run_ranks(checkpoint, loads)
    longer = run_ranks(checkpoint, loads, speculative_num_steps=3)
    assert [rank.tokens for rank in plain] == [rank.tokens for rank in longer]
    step = longer[0].loop.recorder.steps[0]
    assert [each.pass_kind for each in step.passes] == list(Program.speculative(3).passes)
    assert step.passes[0].real_rows == (0,) * len(loads), "nothing is drafted before prefill"


def test_the_next_program_is_chosen_by_the_agreement_alike_on_all_ranks(checkpoint: Path) -> None:
    plain = run_ranks(checkpoint, (2, 1))
    ranks = run_ranks(
        checkpoint, (2, 1), policy=lambda totals: (totals.program_id + 1) % 3,
        speculative_num_steps=3, speculative_adaptive=True,
    )  # fmt: skip
    assert [rank.tokens for rank in plain] == [rank.tokens for rank in ranks]
    shapes = [[len(step.passes) for step in rank.loop.recorder.steps] for rank in ranks]
    assert set(shapes[0]) == {2, 3, 4}
    assert shapes[0] == shapes[1]


def test_idle_ranks_join_with_zero_rows_and_all_idle_runs_nothing(checkpoint: Path) -> None:
    ranks = run_ranks(checkpoint, (2, 0))
    busy, idle = (rank.loop.recorder for rank in ranks)
    assert idle.totals.idle_steps == idle.totals.steps == busy.totals.steps
    assert idle.totals.output_tokens == 0
    assert all(sum(step.passes[0].real_rows) > 0 for step in busy.steps)


def test_every_wait_is_counted_by_the_rank_that_made_the_others_wait(checkpoint: Path) -> None:
    def slow_down(loop: StepLoop) -> None:
        schedule = loop.scheduler.schedule

        def slowly(program: Program, prefill_budget: int | None = None) -> SchedulerOutput:
            sleep(0.02)
            return schedule(program, prefill_budget)

        if loop.coordinator.collective.dp_rank == 1:
            loop.scheduler.schedule = slowly  # type: ignore[method-assign]

    for rank in run_ranks(checkpoint, (2, 1, 0), prepare=slow_down):
        totals = rank.loop.recorder.totals
        assert sum(totals.wait_for_s.values()) == pytest.approx(totals.wait_s)
        if totals.dp_rank != 1:
            assert max(totals.wait_for_s, key=totals.wait_for_s.__getitem__) == 1


def test_each_request_queues_once(checkpoint: Path) -> None:
    ranks = run_ranks(checkpoint, (9, 1), max_num_requests=2)
    assert [rank.loop.recorder.totals.queue_s.count for rank in ranks] == [9, 1]


def test_an_error_on_one_rank_frees_the_others(checkpoint: Path) -> None:
    group = InProcessGroup(2, 20.0)
    config = EngineConfig(str(checkpoint), dp_size=2, launcher="thread", max_model_len=64)
    failing = RuntimeError("the request could not be taken")

    def take(dp_rank: int) -> Inbox:
        if dp_rank == 1:
            raise failing
        return Inbox()

    def run(dp_rank: int) -> None:
        loop = make_loop(config, group, dp_rank)
        loop.run(lambda: take(dp_rank), lambda items: None)

    with ThreadPoolExecutor(2) as pool:
        zero, one = (pool.submit(run, dp_rank) for dp_rank in range(2))
        assert one.exception(10) is failing
        assert "rank 1: RuntimeError: the request could not be taken" in str(zero.exception(10))


def test_the_padding_cost_is_the_same_on_all_ranks() -> None:
    group = InProcessGroup(3, 20.0)
    with ThreadPoolExecutor(3) as pool:
        runs = [
            pool.submit(measure_padding_cost, group.collective(rank), 64, torch.float32, CPU)
            for rank in range(3)
        ]
        costs = {run.result(20) for run in runs}
    assert len(costs) == 1


@pytest.mark.parametrize("num_steps", [0, 2])
def test_agreed_graphs_are_replayed_and_tokens_stay_the_same(
    checkpoint: Path, num_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Threads meet on the host, so nothing is lost if their plans say that a device counts.
    monkeypatch.setattr(step_loop, "counts_real_rows", lambda collective: True)
    replays: list[list[PaddingPlan]] = []
    launches: list[list[PaddingPlan]] = []

    def prepare(loop: StepLoop) -> None:
        captured = captured_of(loop)
        (graphs,) = captured.passes[Pass.TARGET].values()
        replays.append(graphs.replays)  # type: ignore[attr-defined]
        launches.append(captured.piecewise[loop.runner.model].plans)  # type: ignore[attr-defined]
        loop.use_graphs(captured)

    fields: dict[str, Any] = {"speculative_num_steps": num_steps, "overlap": True}
    plain = run_ranks(checkpoint, (2, 1), **fields)
    ranks = run_ranks(checkpoint, (2, 1), prepare=prepare, **fields)
    assert [rank.tokens for rank in plain] == [rank.tokens for rank in ranks]
    assert replays[0] == replays[1], "all ranks replay alike"
    assert launches[0] == launches[1]
    rows = 2 * (1 + num_steps)
    assert {plan.total_gathered for plan in replays[0]} == {2 * rows}, "decodes"
    assert [plan.total_gathered for plan in launches[0]] == [2 * 16], "prompts"
    for plan in (*replays[0], *launches[0]):
        assert plan.offsets[1] == plan.rows_per_rank
    traced = [
        each.gathered_rows
        for step in ranks[0].loop.recorder.steps
        for each in step.passes
        if each.pass_kind == Pass.TARGET
    ]
    assert traced == [plan.gathered_rows for plan in (*launches[0], *replays[0])]


@pytest.mark.parametrize("max_tokens", [(1, 1), (2, 2), (3, 3), (2, 4)])
def test_all_ranks_rest_after_the_same_records(
    checkpoint: Path, max_tokens: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank whose requests draw tokens commits early, and so has no step in flight at the end."""
    monkeypatch.setattr(step_loop, "IDLE_S", 0.05)
    rests: dict[int, list[int]] = {0: [], 1: []}

    def prepare(loop: StepLoop) -> None:
        board = loop.coordinator.board
        idle = board.idle

        def noted(timeout_s: float) -> None:
            rests[board.dp_rank].append(loop.coordinator.step_id)
            idle(timeout_s)

        board.idle = noted  # type: ignore[method-assign]

    greedy = SamplingParams(max_tokens=max_tokens[0], temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(max_tokens=max_tokens[1], temperature=0.9, seed=1, ignore_eos=True)
    run_ranks(
        checkpoint, (1, 1), prepare=prepare, params=(greedy, drawn), overlap=True,
        speculative_num_steps=1,
    )  # fmt: skip
    assert rests[0] == rests[1]
    assert len(rests[0]) >= LAST_STEPS
