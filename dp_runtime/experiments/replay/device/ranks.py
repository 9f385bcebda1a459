"""Runs recorded requests on real ranks: at their steps, or at their times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import monotonic, sleep

from dp_runtime.config import EngineConfig
from dp_runtime.engine.engine import Engine
from dp_runtime.engine.rank_group import RankGroup, start_ranks
from dp_runtime.errors import RankFailed
from dp_runtime.experiments.replay.device.outputs import Outputs
from dp_runtime.experiments.replay.device.requests import Requests
from dp_runtime.experiments.replay.recorded_requests import RecordedRequest
from dp_runtime.metrics.progress_bar import ProgressBar
from dp_runtime.metrics.recording import Recording
from dp_runtime.metrics.status import at_rest
from dp_runtime.metrics.trace import StepTrace

LOOK_EVERY_S, SETTLE_S = 0.02, 10.0


@dataclass(frozen=True, eq=False)
class Replayed:
    recording: Recording
    whole: Recording  # with the warm-up
    outputs: Mapping[int, Sequence[int]]  # tokens by the recorded request id

    def since(self, step_id: int) -> Replayed:
        steps = tuple(step for step in self.recording.steps if step.step_id >= step_id)
        return replace(self, recording=replace(self.recording, steps=steps))


def replay_at_steps(
    config: EngineConfig, requests: Sequence[RecordedRequest], made: Requests, show_progress: bool
) -> Replayed:
    """Have each rank get its requests in the steps in which they came.

    Raises RankFailed, or RequestFailed, if they do not all end.
    """
    config = replace(config, max_recoveries=0)
    by_rank = made.by_rank(requests, config.dp_size)
    outputs = Outputs([each.request_id for some in by_rank.values() for each in some])
    group = start_ranks(config, show_progress, by_rank)
    try:
        group.listen(outputs.listeners)
        with ProgressBar("replay", len(requests), "request", show_progress) as bar:
            outputs.wait(config.step_timeout_s, lambda: _last_step(group), bar)
        recording = Recording.of(asdict(config), group.model, _settled(group))
        return Replayed(recording, recording, outputs.tokens)
    finally:
        group.close()


def _last_step(group: RankGroup) -> int:
    return max(rank.last_step for rank in group.health(SETTLE_S))


def _settled(group: RankGroup) -> tuple[StepTrace, ...]:
    """Return the steps once all ranks have finished the same ones."""
    until = monotonic() + SETTLE_S
    while not at_rest(group.health(SETTLE_S)):
        if monotonic() > until:
            raise RankFailed(f"ranks did not come to rest within {SETTLE_S:g} s")
        sleep(LOOK_EVERY_S)
    return group.trace()


def replay_at_times(
    config: EngineConfig, requests: Sequence[RecordedRequest], made: Requests,
    reroutes: bool, show_progress: bool,
) -> Replayed:  # fmt: skip
    """Ask an engine for them when they were asked for; reroutes: of the ranks that it chooses."""
    with Engine(config, show_progress) as engine:
        few = made.warm_up(config.dp_size)
        engine.generate(
            [each.prompt_token_ids for some in few for each in some],
            [each.params for some in few for each in some],
            [rank for rank, some in enumerate(few) for _ in some],
        )
        warm, begun = max(rank.last_step for rank in engine.health()), monotonic()
        handles = []
        with ProgressBar("replay", len(requests), "request", show_progress) as bar:
            for number, request in enumerate(sorted(requests, key=lambda each: each.at_s)):
                sleep(max(0.0, begun + request.at_s - monotonic()))
                asked = made.again(request)
                params = replace(
                    asked.params, max_tokens=request.output_tokens, ignore_eos=True,
                    stop_token_ids=(),
                )  # fmt: skip
                dp_rank = None if reroutes else request.dp_rank
                handle = engine.submit(asked.prompt_token_ids, params, dp_rank)
                handles.append((request.request_id, handle))
                bar.update(number)
        outputs = {number: handle.result().token_ids for number, handle in handles}
        whole = engine.recording()
    steps = tuple(step for step in whole.steps if step.step_id > warm)
    return Replayed(replace(whole, steps=steps), whole, outputs)
