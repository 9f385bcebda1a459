"""What a rank tells while it captures graphs and serves, and who notices if it gets stuck."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from collectives.in_process import InProcessGroup
from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.metrics.health_report import HealthReport
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.runner.graphs.pending_capture import PendingCapture
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_runner import CapturedGraphs
from dp_runtime.startup import rank_plan
from dp_runtime.startup.rank_plan import RankPlan
from tests.checkpoints import tiny_checkpoint
from tests.dp_runtime.runner.eager_graphs import captured_of
from tests.serving import check_pages_free
from tests.workers.disturbed import alike, recovering
from tests.workers.leftovers import wait_until
from workers.messages import InProcessRendezvous, Message
from workers.stages import rank_stages
from workers.supervision.watch import RankWatch, SilenceLimits
from workers.worker import Worker

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
RANKS = 3
OnCaptured = Callable[[int, int], None]


class HeldCapture(PendingCapture):
    """Goes on behind the first graph once it may on all ranks."""

    held: threading.Event

    def advance(self) -> CapturedGraphs | None:
        waits = self._done > 0 and self.held.is_set()
        if any(held for (held,) in self._collective.all_gather_ints((waits,))):
            return None
        return super().advance()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("capture"))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Have CPU ranks capture graphs, which are held while this is set."""
    held, plan_rank = threading.Event(), rank_plan.plan_rank

    def plan(*args: Any) -> RankPlan:
        return replace(plan_rank(*args), graphs=True)

    def plan_capture(plan: RankPlan, loop: StepLoop, count: OnCaptured) -> PendingCapture:
        collective = loop.runner.collective
        pending = HeldCapture(captured_of(loop), collective, lambda: None, lambda: 0, count)
        pending.held = held
        return pending

    monkeypatch.setattr(rank_stages, "plan_rank", plan)
    monkeypatch.setattr(rank_stages, "plan_capture", plan_capture)
    return held


def test_after_a_recovery_ranks_serve_while_they_capture(
    model: Path, held: threading.Event
) -> None:
    prompts = [[5, 6, 7 + number] for number in range(2 * RANKS)]
    with recovering(model, "thread", inject="rank=1,step=5,kind=raise", overlap=True) as engine:
        started = engine.health()
        assert all(rank.graphs and rank.graphs.count == rank.graphs_total for rank in started)
        held.set()
        outputs = engine.generate(prompts, GREEDY)
        ranks = engine.health()
        assert {(rank.state, rank.epoch) for rank in ranks} == {(RankState.CAPTURING, 1)}
        assert all(0 < rank.graphs_captured < rank.graphs_total for rank in ranks)
        assert {rank.graphs for rank in ranks} == {None}, "their use is known at the end"
        assert HealthReport.of(ranks).can_serve
        held.clear()
        wait_until(lambda: states(engine) == {RankState.IDLE}, "all is captured")
        for before, after in zip(started, engine.health(), strict=True):
            assert before.graphs is not None
            assert after.graphs is not None
            assert before.graphs.count == after.graphs.count
            assert after.graphs_captured == after.graphs_total
        assert alike(engine.generate(prompts, GREEDY)) == alike(outputs), "from graphs too"
        check_pages_free(engine)


def states(engine: Engine) -> set[RankState]:
    return {rank.state for rank in engine.health()}


def test_ranks_that_capture_can_be_lost_and_closed(model: Path, held: threading.Event) -> None:
    """Epoch 1 ends while its graphs are captured, and the engine while those of epoch 2 are."""
    inject = "rank=1,step=5,kind=raise;rank=2,step=9,kind=raise,epoch=1"
    with recovering(model, "thread", inject=inject) as engine:
        held.set()
        outputs = engine.generate([[5, 6, 7 + number] for number in range(2 * RANKS)], GREEDY)
        assert all(len(output.token_ids) == GREEDY.max_tokens for output in outputs)
        ranks = engine.health()
        assert {(rank.state, rank.epoch) for rank in ranks} == {(RankState.CAPTURING, 2)}
        group: Any = engine._core._group
        assert [one.dp_ranks for one in group._supervisor._recovery._history] == [(1,), (2,)]


def test_the_graphs_of_the_last_epoch_are_gone_before_others_are_made(
    model: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else their memory would be needed twice; no collector of garbage is needed for that."""
    made: list[weakref.ref[Any]] = []
    left: list[int] = []
    plan_capture = rank_stages.plan_capture  # type: ignore[attr-defined]

    def noted(*args: Any) -> PendingCapture:
        left.append(sum(one() is not None for one in made))
        pending = plan_capture(*args)
        made.extend(weakref.ref(one) for one in (pending, pending.graphs))
        return pending

    monkeypatch.setattr(rank_stages, "plan_capture", noted)
    worker = Worker(0, EngineConfig(str(model), launcher="thread", max_model_len=256), "cpu")
    worker.prepare()
    worker.load()
    gc.disable()
    try:
        for epoch in range(4):
            if epoch >= 2:
                held.set()
            worker.join(InProcessRendezvous(InProcessGroup(1, 10.0)), epoch)
            until(worker, RankState.CAPTURING if epoch >= 2 else RankState.IDLE)
            worker.suspend("an epoch ends")
    finally:
        gc.enable()
    assert left == [0] * 4


def until(worker: Worker, state: RankState) -> None:
    wait_until(lambda: worker.health().state is state, f"it is {state}")


class Answering:
    """A rank that captures, one graph more at each question or none."""

    dp_rank, answered = 0, True

    def __init__(self, moves: bool) -> None:
        self.num_asked, self._moves = 0, moves

    def call(self, message: Message[RankHealth]) -> Future[RankHealth]:
        self.num_asked += 1
        future: Future[RankHealth] = Future()
        captured = self.num_asked if self._moves else 1
        future.set_result(RankHealth(0, RankState.CAPTURING, last_step=7, graphs_captured=captured))
        return future


def watched(moves: bool, until: Callable[[Answering, list[str]], bool]) -> list[str]:
    rank, said = Answering(moves), list[str]()
    limits = SilenceLimits(60.0, 60.0, step=0.3)
    watch = RankWatch([rank], limits, lambda lost, text: said.append(text))
    try:
        wait_until(lambda: until(rank, said), "the rank was asked, or is known to be stuck")
    finally:
        watch.end()
    return said


def often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BEAT_S", "LOOK_EVERY_S"):
        monkeypatch.setattr(f"workers.supervision.watch.{name}", 0.05)


def test_an_idle_rank_that_captures_is_not_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    often(monkeypatch)
    assert watched(True, lambda rank, said: rank.num_asked > 4) == []


def test_a_capture_that_does_not_end_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    often(monkeypatch)
    (text, *_) = watched(False, lambda rank, said: bool(said))
    assert text == "ranks [0] have ended no step for 0.3 s"
