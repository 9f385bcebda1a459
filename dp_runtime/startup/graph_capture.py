"""The capture of a rank's graphs, an event of all ranks at once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

import torch

from dp_runtime.core.step_program import Pass
from dp_runtime.metrics.status import GraphUse
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import GraphBuckets, PiecewiseBuckets
from dp_runtime.parallel.row_exchange import counts_real_rows
from dp_runtime.runner.pass_graphs import PassGraphs
from dp_runtime.runner.piecewise_graphs import PiecewiseGraphs
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_runner import CapturedGraphs, StepRunner
from dp_runtime.startup.device_memory import free_bytes
from dp_runtime.startup.rank_plan import RankPlan

logger = logging.getLogger(__name__)

MakeBuckets = Callable[[int, int], GraphBuckets]  # of max_requests and query_len


def capture(
    plan: RankPlan,
    loop: StepLoop,
    on_captured: Callable[[int, int], None],  # hears how many are done, of how many
    make_buckets: MakeBuckets = GraphBuckets,
) -> GraphUse:
    """Capture all graphs together with all other ranks; the loop then replays them."""
    started, free = monotonic(), free_bytes(plan.device)
    captured = CapturedGraphs(
        passes={
            pass_kind: _pass_graphs(pass_kind, plan, loop, make_buckets)
            for pass_kind in loop.runner.passes
        },
        piecewise=_piecewise_graphs(loop.runner, plan.limits.max_num_tokens),
    )
    of_passes = [graphs for each in captured.passes.values() for graphs in each.values()]
    parts: list[PassGraphs | PiecewiseGraphs] = [*captured.piecewise.values(), *of_passes]
    total, done = sum(part.count for part in parts), 0
    try:
        with torch.inference_mode():
            for part in parts:
                for _ in part.capture():
                    done += 1
                    on_captured(done, total)
    except BaseException as error:
        loop.coordinator.abort(f"{type(error).__name__}: {error}")
        raise
    loop.use_graphs(captured)
    use = GraphUse(total, monotonic() - started, free - free_bytes(plan.device))
    stages = captured.piecewise[loop.runner.model].buckets
    logger.info(
        "captured %s; steps with prefill replay their MoE stages up to %d rows of a rank",
        use,
        stages.max_rows,
    )
    return use


def _pass_graphs(
    pass_kind: Pass, plan: RankPlan, loop: StepLoop, make_buckets: MakeBuckets
) -> dict[int, PassGraphs]:
    programs, runner = loop.coordinator.programs, loop.runner.passes[pass_kind]
    lengths = sorted(
        {program.query_len(pass_kind) for program in programs if pass_kind in program.passes}
    )
    return {
        length: PassGraphs(
            runner.model,
            plan.pages,
            -(-plan.limits.max_cached_len // plan.pages.page_size),
            runner.collective,
            make_buckets(plan.limits.max_num_requests, length),
            reads_hidden=pass_kind is not Pass.TARGET,
            # In draft_extend only the device knows which rows need logits.
            with_logits=pass_kind is not Pass.DRAFT_EXTEND,
            poison=runner.poison,
            device=runner.device,
        )
        for length in lengths
    }


def _piecewise_graphs(runner: StepRunner, max_num_tokens: int) -> dict[PassModel, PiecewiseGraphs]:
    collective, buckets = runner.collective, PiecewiseBuckets()
    # If padding crosses the wire, a stage at a bucket's size costs more than an eager one.
    if collective.dp_size == 1 or counts_real_rows(collective):
        buckets = PiecewiseBuckets.for_steps(max_num_tokens)
    models = {each.model: None for each in runner.passes.values()}
    return {
        model: PiecewiseGraphs(model, collective, buckets, runner.poison, runner.device)
        for model in models
    }
