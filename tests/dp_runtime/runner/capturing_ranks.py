"""A rank that captures graphs while it serves a script of arrivals; runs in any kind of ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dp_runtime.config import EngineConfig
from dp_runtime.core.request import RankRequest, RequestUpdate
from dp_runtime.core.sampling_params import SamplingParams
from dp_runtime.parallel.agreement import Agreement, StepRecord
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.execution_plan import ExecutionMode
from dp_runtime.parallel.step_board import StepBoard
from dp_runtime.runner import step_loop
from dp_runtime.runner.graphs.pending_capture import PendingCapture
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.startup.build_rank import assemble, load_rank, new_flight
from dp_runtime.startup.rank_plan import plan_rank
from tests.dp_runtime.runner.eager_graphs import captured_of

Arrivals = Sequence[Mapping[int, int]]  # [rank]: by step, how many requests come before it


@dataclass
class Seen:
    """What one rank did."""

    places: list[tuple[int, int]] = field(default_factory=list)  # step and number of each graph
    plans: list[tuple[ExecutionMode, ...]] = field(default_factory=list)  # [step]
    tokens: dict[int, list[int]] = field(default_factory=dict)  # by request
    progress: list[tuple[int, int]] = field(default_factory=list)  # graphs done, of how many
    naps: list[int] = field(default_factory=list)  # steps after which it slept
    error: str = ""


class Meeting:
    """Stands for the capture of a graph: all ranks must meet for the same one in the same step."""

    def __init__(self, loop: StepLoop, seen: Seen, failing: int) -> None:
        self._loop, self._seen, self._failing = loop, seen, failing

    def __call__(self) -> None:
        coordinator = self._loop.coordinator
        number, step = len(self._seen.places), coordinator.step_id - 1
        if number == self._failing:
            raise RuntimeError("out of memory")
        assert not self._loop._inflight, "tokens wait for a capture"
        places = coordinator.collective.all_gather_ints((step, number))
        assert set(places) == {(step, number)}, f"ranks capture at different places: {places}"
        self._seen.places.append((step, number))


def capturing_case(
    collective: RowCollective,
    board: StepBoard,
    directory: Path,
    arrivals: Arrivals,
    num_steps: int,
    captures: bool = True,
    failing: tuple[int, int] = (-1, -1),  # the rank whose capture fails, and at which graph
    **fields: Any,
) -> Seen:
    """Serve the arrivals in num_steps steps, of which rank 0 tells the last."""
    step_loop.IDLE_S = 0.05
    rank, seen = collective.dp_rank, Seen()
    loop = make_loop(directory, collective, board, **fields)
    watch(loop, seen)
    if captures:
        meeting = Meeting(loop, seen, failing[1] if failing[0] == rank else -1)
        count = lambda *done: seen.progress.append(done)  # noqa: E731
        loop.capture(
            PendingCapture(captured_of(loop, meeting), collective, lambda: None, lambda: 0, count)
        )
    params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
    next_ids = iter(range(1000))

    def take() -> Inbox:
        step = loop.coordinator.step_id
        new = [next(next_ids) for _ in range(arrivals[rank].get(step, 0))]
        requests = [RankRequest(n, (3, 4 + rank, 5 + n), params, 0, frozenset()) for n in new]
        return Inbox(requests, (), stop=rank == 0 and step >= num_steps)

    def deliver(updates: list[RequestUpdate]) -> None:
        for one in updates:
            seen.tokens.setdefault(one.request_id, []).extend(one.token_ids)

    try:
        loop.run(take, deliver)
    except RuntimeError as error:
        seen.error = f"{type(error).__name__}: {error}"
    return seen


def make_loop(
    directory: Path, collective: RowCollective, board: StepBoard, **fields: Any
) -> StepLoop:
    config = EngineConfig(
        str(directory), dp_size=collective.dp_size, launcher="thread", max_model_len=64,
        num_pages=40, poison_padding=True, **fields,
    )  # fmt: skip
    plan = plan_rank(config, collective.dp_rank, "cpu")
    loaded = load_rank(config, plan, lambda count: None)
    return assemble(config, plan, loaded, board, collective, new_flight(config, plan))


def watch(loop: StepLoop, seen: Seen) -> None:
    agree = loop.coordinator.agree

    def noted(records: Sequence[StepRecord]) -> Agreement:
        agreement = agree(records)
        seen.plans.append(tuple(plan.mode for plan in agreement.plans))
        return agreement

    board = loop.coordinator.board
    idle = board.idle

    def nap(timeout_s: float) -> None:
        if timeout_s:
            seen.naps.append(loop.coordinator.step_id - 1)
        idle(timeout_s)

    loop.coordinator.agree = noted  # type: ignore[method-assign]
    board.idle = nap  # type: ignore[method-assign]
