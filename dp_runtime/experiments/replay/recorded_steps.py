"""Steps of a recording, each of all ranks, and what their agreements were."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from statistics import fmean

from dp_runtime.config import EngineConfig
from dp_runtime.core.step_program import Pass
from dp_runtime.errors import RankDisagreement, not_allowed, require
from dp_runtime.experiments.replay.possible_steps import check_ranks, check_step
from dp_runtime.experiments.replay.step_shape import StepShape
from dp_runtime.metrics.recording import Recording
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.parallel.agreement import Agreement, StepRecord, agree
from dp_runtime.parallel.buckets import GraphBuckets, PiecewiseBuckets
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPolicy
from dp_runtime.parallel.padding import PaddingCost
from dp_runtime.startup.step_policies import StepPolicies


@dataclass(frozen=True)
class RecordedStep:
    traces: tuple[StepTrace, ...]  # [rank], by their positions

    @cached_property
    def records(self) -> tuple[StepRecord, ...]:
        return tuple(StepRecord.from_words(trace.record) for trace in self.traces)

    @property
    def plans(self) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """List mode, real and gathered rows of each pass, as the ranks had agreed."""
        return [(each.mode, each.real_rows, each.gathered_rows) for each in self.traces[0].passes]

    @property
    def seconds(self) -> float:
        """The step's time, waits included: the mean of the ranks, which wait for each other."""
        return fmean(trace.busy_s + trace.wait_s for trace in self.traces)

    def shape(self, agreement: Agreement) -> StepShape:
        kv, attended = zip(*((each.kv_tokens, each.attended_tokens) for each in self.traces))
        return StepShape(self.records, agreement.plans, kv, attended)


def recorded_steps(recording: Recording) -> list[RecordedStep]:
    """Return the steps that all of their ranks remember; ValueError if there are none."""
    steps: dict[tuple[int, int], list[StepTrace]] = defaultdict(list)
    for trace in recording.steps:
        check_step(trace)
        steps[trace.epoch, trace.step_id].append(trace)
    whole = [
        RecordedStep(tuple(sorted(traces, key=lambda each: each.index)))
        for _, traces in sorted(steps.items())
        if len(traces) == len(traces[0].passes[0].real_rows)
    ]
    require(bool(whole), "recording: steps", 0, "at least one that all ranks remember")
    max_num_requests = recorded_config(recording).max_num_requests
    for step in whole:
        check_ranks(step.traces, max_num_requests)
    return whole


def recorded_config(recording: Recording, **changes: object) -> EngineConfig:
    """Return the configuration of a run, with some fields changed."""
    values = {**recording.config, **changes}
    try:
        return EngineConfig(**values)
    except TypeError as error:
        raise not_allowed("recording: config", str(error), "fields of EngineConfig") from None


def recorded_depth(recording: Recording) -> int:
    """Tell whether a rank launched steps before the ones before were committed: 1, else 0."""
    by_rank: dict[int, list[StepTrace]] = defaultdict(list)
    for trace in recording.steps:
        by_rank[trace.dp_rank].append(trace)
    ahead = (
        later.start_s < earlier.commit_start_s
        for traces in by_rank.values()
        for earlier, later in pairwise(traces)
    )
    return int(any(ahead))


def replay_rows(
    recording: Recording, steps: Sequence[RecordedStep], config: EngineConfig
) -> list[Agreement]:
    """Agree again on the same rows by the padding and the buckets of a configuration."""
    execution = execution_of(recording, config)
    programs = config.programs
    try:
        return [
            agree(
                step.records, programs, execution=execution,
                dp_ranks=[trace.dp_rank for trace in step.traces],
            )
            for step in steps
        ]  # fmt: skip
    except RankDisagreement as error:
        raise not_allowed("recording: record", str(error), "records that ranks agree on") from None


def measured_steps(recording: Recording) -> tuple[list[StepShape], list[float]]:
    """Return sizes and seconds of each step, under the settings of the run."""
    steps = recorded_steps(recording)
    agreements = replay_rows(recording, steps, recorded_config(recording))
    shapes = [step.shape(agreed) for step, agreed in zip(steps, agreements, strict=True)]
    return shapes, [step.seconds for step in steps]


def execution_of(recording: Recording, config: EngineConfig) -> ExecutionPolicy:
    """Return how passes are planned: with the buckets of graphs where the run had them."""
    policies = StepPolicies.by(config, recorded_depth(recording), unmeasured_cost)
    modes = {each.mode for step in recording.steps for each in step.passes}
    piecewise = PiecewiseBuckets()
    if ExecutionMode.PIECEWISE in modes:
        piecewise = PiecewiseBuckets.for_steps(config.max_num_tokens)
    graphs: dict[tuple[Pass, int], GraphBuckets] = {}
    if ExecutionMode.GRAPH in modes:
        for kind, length in {(k, p.query_len(k)) for p in config.programs for k in p.passes}:
            sizes = () if kind is Pass.DRAFT else piecewise.sizes
            graphs[kind, length] = GraphBuckets(config.max_num_requests, length, sizes)
    return ExecutionPolicy(policies.padding, graphs, piecewise)


def unmeasured_cost() -> PaddingCost:
    allowed = "max_len, ragged or FILE.py:CLASS: a replay can not measure what auto goes by"
    raise not_allowed("padding", "auto", allowed)
