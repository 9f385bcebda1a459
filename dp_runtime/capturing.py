"""Capturing the graphs of a rank, an event of all ranks at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import monotonic

from dp_runtime.device_memory import free_bytes
from dp_runtime.graph_buckets import GraphBuckets, StageBuckets
from dp_runtime.graphs import SlotGraphs
from dp_runtime.layers.exchange import counts_on_device
from dp_runtime.models import SlotModel
from dp_runtime.program import Slot
from dp_runtime.sizing import RankPlan
from dp_runtime.stage_graphs import StageGraphs
from dp_runtime.status import GraphUse
from dp_runtime.step import StepLoop

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
        slot: _slot_graphs(slot, plan, loop, poison, make_buckets) for slot in loop.runner.slots
    }
    stages = _stage_graphs(plan, loop, poison)
    captures: list[SlotGraphs | StageGraphs] = [*stages.values()]
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


def _slot_graphs(
    slot: Slot, plan: RankPlan, loop: StepLoop, poison: bool, make_buckets: MakeBuckets
) -> dict[int, SlotGraphs]:
    """Of one kind of slot, for every query length that a program has in it."""
    programs, runner = loop.coordinator.programs, loop.runner.slots[slot]
    lengths = sorted({program.query_len(slot) for program in programs if slot in program.slots})
    return {
        length: SlotGraphs(
            runner.model,
            plan.pages,
            -(-plan.limits.max_cached_len // plan.pages.page_size),
            loop.coordinator.collective,
            make_buckets(plan.limits.max_num_requests, length),
            reads_hidden=slot is not Slot.TARGET,
            with_logits=slot is not Slot.DRAFT_EXTEND,  # where the host does not know which rows
            poison=poison,
            device=loop.runner.device,
        )
        for length in lengths
    }


def _stage_graphs(plan: RankPlan, loop: StepLoop, poison: bool) -> dict[SlotModel, StageGraphs]:
    """Of every model that runs in some slot."""
    collective, most = loop.coordinator.collective, plan.limits.max_num_tokens
    sizes = StageBuckets.of(most) if counts_on_device(collective) else StageBuckets.none()
    return {
        model: StageGraphs(model, collective, sizes, poison, loop.runner.device)
        for model in {runner.model: None for runner in loop.runner.slots.values()}
    }
