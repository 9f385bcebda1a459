"""Capturing the graphs of a rank, an event of all ranks at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic

from dp_runtime.core.program import Pass
from dp_runtime.metrics.status import GraphUse
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import GraphBuckets, StageBuckets
from dp_runtime.parallel.exchange import counts_on_device
from dp_runtime.runner.graphs import PassGraphs
from dp_runtime.runner.piecewise_graphs import PiecewiseGraphs
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.startup.device_memory import free_bytes
from dp_runtime.startup.rank_plan import RankPlan

MakeBuckets = Callable[[int, int], GraphBuckets]  # of most requests, and rows of each


def capture(
    plan: RankPlan,
    loop: StepLoop,
    poison: bool,
    on_captured: Callable[[int, int], None],
    make_buckets: MakeBuckets = GraphBuckets,
) -> GraphUse:
    """Capture all graphs of a rank, with all others; the loop then replays them.

    on_captured hears how many are done, of how many.
    """
    started, free = monotonic(), free_bytes(plan.device)
    graphs = {
        pass_kind: _pass_graphs(pass_kind, plan, loop, poison, make_buckets)
        for pass_kind in loop.runner.passes
    }
    stages = _stage_graphs(plan, loop, poison)
    captures: list[PassGraphs | PiecewiseGraphs] = [*stages.values()]
    for by_length in graphs.values():
        captures += by_length.values()
    total, done = sum(some.count for some in captures), 0
    try:
        for some in captures:
            some.capture(partial(_count, on_captured, done, total))
            done += some.count
    except BaseException as error:
        loop.coordinator.abort(f"{type(error).__name__}: {error}")
        raise
    loop.runner.use_graphs(graphs, stages)
    return GraphUse(total, monotonic() - started, free - free_bytes(plan.device))


def _count(on_captured: Callable[[int, int], None], before: int, total: int, done: int) -> None:
    on_captured(before + done, total)


def _pass_graphs(
    pass_kind: Pass, plan: RankPlan, loop: StepLoop, poison: bool, make_buckets: MakeBuckets
) -> dict[int, PassGraphs]:
    """Of one kind of pass, for every query length that a program has in it."""
    programs, runner = loop.coordinator.programs, loop.runner.passes[pass_kind]
    lengths = sorted(
        {program.query_len(pass_kind) for program in programs if pass_kind in program.passes}
    )
    return {
        length: PassGraphs(
            runner.model,
            plan.pages,
            -(-plan.limits.max_cached_len // plan.pages.page_size),
            loop.coordinator.collective,
            make_buckets(plan.limits.max_num_requests, length),
            reads_hidden=pass_kind is not Pass.TARGET,
            with_logits=pass_kind
            is not Pass.DRAFT_EXTEND,  # where the host does not know which rows
            poison=poison,
            device=loop.runner.device,
        )
        for length in lengths
    }


def _stage_graphs(plan: RankPlan, loop: StepLoop, poison: bool) -> dict[PassModel, PiecewiseGraphs]:
    """Of every model that runs in some pass."""
    collective, most = loop.coordinator.collective, plan.limits.max_num_tokens
    sizes = StageBuckets.of(most) if counts_on_device(collective) else StageBuckets.none()
    return {
        model: PiecewiseGraphs(model, collective, sizes, poison, loop.runner.device)
        for model in {runner.model: None for runner in loop.runner.passes.values()}
    }
