"""Whether ranks can have had the steps of a recording, which may have been edited."""

from __future__ import annotations

from collections.abc import Sequence

from dp_runtime.core.step_program import Pass
from dp_runtime.errors import require
from dp_runtime.metrics.trace import PassTrace, StepTrace
from dp_runtime.parallel.agreement import RECORD_WORDS, StepRecord
from dp_runtime.parallel.buckets import GraphBuckets
from dp_runtime.parallel.execution_plan import ExecutionMode

KINDS, MODES = ([str(name) for name in names] for names in (Pass, ExecutionMode))
MAX_COUNT = 2**31 - 1  # of rows, tokens and requests


def check_step(trace: StepTrace) -> None:
    """Raise ValueError for a step that no rank can have had."""
    where = f"recording: step {trace.step_id} of rank {trace.dp_rank}"
    require(bool(trace.passes), f"{where}: passes", 0, "at least one")
    num_ranks = len(trace.passes[0].real_rows)
    for each in trace.passes:
        _check_pass(each, num_ranks, f"{where}: passes")
    ok, allowed = trace.index < num_ranks, f"below {num_ranks}, of which each has rows"
    require(ok, f"{where}: position", trace.index, allowed)
    seconds = trace.busy_s + trace.wait_s
    require(seconds > 0, f"{where}: seconds", seconds, "above 0 in all")
    _check_record(trace, where)
    for name in ("kv_tokens", "attended_tokens"):
        require(getattr(trace, name) <= MAX_COUNT, f"{where}: {name}", getattr(trace, name), MOST)


def _check_pass(each: PassTrace, num_ranks: int, where: str) -> None:
    require(each.pass_kind in KINDS, f"{where}: pass_kind", each.pass_kind, ", ".join(KINDS))
    require(each.mode in MODES, f"{where}: mode", each.mode, ", ".join(MODES))
    for name in ("real_rows", "gathered_rows"):
        rows = getattr(each, name)
        ok = len(rows) == num_ranks > 0 and max(rows) <= MAX_COUNT
        require(ok, f"{where}: {name}", rows, f"a count for each of the same ranks, {MOST}")


def _check_record(trace: StepTrace, where: str) -> None:
    record = trace.record
    require(len(record) == RECORD_WORDS, f"{where}: record", record, f"{RECORD_WORDS} integers")
    posted = StepRecord.from_words(record)
    rows = tuple(each.real_rows[trace.index] for each in trace.passes)
    allowed = f"{rows}, as its passes have, and counts {MOST}"
    require(posted.real_rows == rows, f"{where}: record: real_rows", posted.real_rows, allowed)
    require(max(record[3:]) <= MAX_COUNT, f"{where}: record", record, allowed)


def check_ranks(traces: Sequence[StepTrace], max_num_requests: int) -> None:
    """Raise ValueError where one position has two ranks, or they tell of other passes."""
    positions = [trace.index for trace in traces]
    where = f"recording: step {traces[0].step_id}"
    ok = positions == [*range(len(traces))]
    require(ok, f"{where}: positions", positions, f"each of 0..{len(traces) - 1} once")
    for trace in traces:
        plans, first = _plans(trace), traces[0].dp_rank
        ok, allowed = plans == _plans(traces[0]), f"those of rank {first}, {_plans(traces[0])}"
        require(ok, f"{where} of rank {trace.dp_rank}: passes", plans, allowed)
    _check_modes(traces, max_num_requests, f"{where}: passes: mode")


def _plans(trace: StepTrace) -> list[tuple[object, ...]]:
    return [(one.pass_kind, one.mode, one.real_rows, one.gathered_rows) for one in trace.passes]


def _check_modes(traces: Sequence[StepTrace], max_num_requests: int, where: str) -> None:
    """Have passes be replayed where all ranks voted for it, and had graphs of so many rows."""
    posted = [StepRecord.from_words(trace.record) for trace in traces]
    for n, each in enumerate(traces[0].passes):
        if any(each.real_rows):
            fits = all(record.graph_votes >> n & 1 for record in posted)
            query_len = 1 if each.pass_kind == Pass.DRAFT else len(traces[0].passes)
            largest = GraphBuckets(max_num_requests, query_len).max_rows
            ok = fits == (each.mode == ExecutionMode.GRAPH)
            require(ok, where, each.mode, "graph where all ranks voted for it, and only there")
            ok, allowed = not fits or max(each.real_rows) <= largest, f"up to {largest} rows"
            require(ok, where, f"graph for {max(each.real_rows)} rows", allowed)


MOST = f"at most {MAX_COUNT}"
