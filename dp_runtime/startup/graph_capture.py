"""Which graphs a rank captures, together with all others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from dp_runtime.core.step_program import Pass
from dp_runtime.models.model import PassModel
from dp_runtime.parallel.buckets import GraphBuckets, PiecewiseBuckets
from dp_runtime.parallel.collective import DeviceCountCollective, RowCollective
from dp_runtime.parallel.row_exchange import counts_real_rows
from dp_runtime.runner.graphs.cuda_graph import GraphMemory
from dp_runtime.runner.graphs.pass_graphs import PassGraphs
from dp_runtime.runner.graphs.pending_capture import PendingCapture
from dp_runtime.runner.graphs.piecewise_graphs import PiecewiseGraphs
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_runner import CapturedGraphs, StepRunner
from dp_runtime.startup.device_memory import uncached_free_bytes
from dp_runtime.startup.rank_plan import RankPlan

MakeBuckets = Callable[[int, int], GraphBuckets]  # of max_requests and query_len


def plan_capture(
    plan: RankPlan,
    loop: StepLoop,
    on_captured: Callable[[int, int], None],  # hears how many are done, of how many
    make_buckets: MakeBuckets = GraphBuckets,
) -> PendingCapture:
    """Make the buffers of all graphs of a loop, which are yet to be captured."""
    before = uncached_free_bytes(plan.device)
    gathered, memory = _gathered_buckets(loop, plan), GraphMemory.new()
    models = dict.fromkeys(each.model for each in loop.runner.passes.values())
    graphs = CapturedGraphs(
        passes={
            pass_kind: _pass_graphs(pass_kind, plan, loop, gathered, make_buckets, memory)
            for pass_kind in loop.runner.passes
        },
        piecewise={
            model: _piecewise_graphs(model, loop.runner, gathered, memory) for model in models
        },
    )
    used_bytes = lambda: before - uncached_free_bytes(plan.device)  # noqa: E731
    make_room = partial(_make_room, loop.runner.collective, plan, tuple(models))
    return PendingCapture(graphs, loop.runner.collective, make_room, used_bytes, on_captured)


def _make_room(collective: RowCollective, plan: RankPlan, models: Sequence[PassModel]) -> None:
    """Reserve memory for the largest step's rows: the first start has run it, others have not."""
    if counts_real_rows(collective):
        assert isinstance(collective, DeviceCountCollective), f"{collective} counts rows"
        row_bytes = max(model.hidden_size * model.dtype.itemsize for model in models)
        collective.reserve(plan.limits.max_num_tokens, row_bytes)


def capture_all(loop: StepLoop, pending: PendingCapture) -> None:
    """Capture all graphs before any step, together with all other ranks; the loop replays them."""
    loop.capture(pending)
    try:
        while loop.is_capturing:
            loop.advance_capture()
    except BaseException as error:
        loop.coordinator.abort(f"{type(error).__name__}: {error}")
        raise


def _pass_graphs(
    pass_kind: Pass,
    plan: RankPlan,
    loop: StepLoop,
    gathered: PiecewiseBuckets,
    make_buckets: MakeBuckets,
    memory: GraphMemory,
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
            replace(
                make_buckets(plan.limits.max_num_requests, length),
                # No prompt has a row in a draft pass.
                piecewise_sizes=() if pass_kind is Pass.DRAFT else gathered.sizes,
            ),
            memory,
            reads_hidden=pass_kind is not Pass.TARGET,
            # In draft_extend only the device knows which rows need logits.
            with_logits=pass_kind is not Pass.DRAFT_EXTEND,
            poison=runner.poison,
            device=runner.device,
            num_state_slots=runner.num_state_slots,
            accepted_drafts=runner.accepted_drafts,
        )
        for length in lengths
    }


def _gathered_buckets(loop: StepLoop, plan: RankPlan) -> PiecewiseBuckets:
    collective = loop.runner.collective
    # If padding crosses the wire, a pass at a bucket's size costs more than an eager one.
    if collective.dp_size == 1 or counts_real_rows(collective):
        return PiecewiseBuckets.for_steps(plan.limits.max_num_tokens)
    return PiecewiseBuckets()


def _piecewise_graphs(
    model: PassModel, runner: StepRunner, buckets: PiecewiseBuckets, memory: GraphMemory
) -> PiecewiseGraphs:
    return PiecewiseGraphs(
        model,
        runner.collective,
        buckets,
        memory,
        reads_hidden=model is not runner.model,
        poison=runner.poison,
        device=runner.device,
    )
