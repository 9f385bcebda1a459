"""What the flight recorder costs a step: its notes alone, and steps with and without them.

    python -m examples.benchmarks.flight_recorder
    python -m examples.benchmarks.flight_recorder --rounds 40 --layers 48

Prints medians in microseconds: of the notes of a step on one of four ranks, of a pair of
collectives, and of the tiny model's steps of decodes on one CPU rank, in blocks with and without
notes in turns. Steps are in CPU time, which other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from statistics import median
from time import thread_time
from unittest.mock import patch

import torch

from collectives.in_process import InProcessGroup
from dp_runtime import EngineConfig, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from dp_runtime.core.request import RankRequest
from dp_runtime.core.step_program import SERVING_PROGRAMS
from dp_runtime.flight.recorder import FlightRecorder, Kind
from dp_runtime.flight.ring import FlightRing, RingLayout
from dp_runtime.parallel.agreement import StepRecord, agree
from dp_runtime.runner.step_loop import Inbox, StepLoop
from dp_runtime.startup.build_rank import assemble, load_rank, new_flight
from dp_runtime.startup.rank_plan import plan_rank
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.timing import measure

RANKS = 4
BLOCK = 25  # steps of the tiny model in a row with, or without
REQUESTS = 8
GPU_STEP_US = 7000.0  # a decode step of the Qwen3-30B-A3B shape: RESULTS.md
NOTES = (
    "schedule", "post", "agree", "begin_pass", "end_pass", "enter", "leave", "sample", "commit",
    "committed", "rest",
)  # fmt: skip


@dataclass(frozen=True)
class NoteCosts:
    step_us: float  # without collectives
    pair_us: float  # an all-gather and a reduce-scatter


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    gc.freeze()
    print(machine.describe("torch"), f"; load {os.getloadavg()[0]:.1f}")
    costs = time_notes()
    print(f"notes of a step: {costs.step_us:.1f} us; of a pair of collectives {costs.pair_us:.2f}")
    with_notes, without = time_steps(args.rounds)
    layers = tiny_layers()
    noted = costs.step_us + layers * costs.pair_us
    print(
        f"tiny model, {REQUESTS} decodes on one rank: a step {with_notes:.0f} us with notes, "
        f"{without:.0f} us without; {noted:.1f} us of notes are {noted / with_notes:.2%} of it"
    )
    print(
        f"of a {GPU_STEP_US / 1e3:g} ms decode step from a graph: "
        f"{costs.step_us / GPU_STEP_US:.2%}; an eager step of {args.layers} MoE layers notes "
        f"{costs.step_us + args.layers * costs.pair_us:.0f} us"
    )


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="of two blocks of steps each")
    parser.add_argument("--layers", type=int, default=48)
    return parser.parse_args()


def time_notes() -> NoteCosts:
    flight = FlightRecorder(FlightRing.shared(RingLayout(RANKS, 1, 100), 0))
    flight.join(0, "shared_memory")
    agreement = agree([StepRecord(0, 0, 0, (32,))] * RANKS, SERVING_PROGRAMS)
    steps = count()

    def step() -> None:
        step_id = next(steps)
        flight.schedule(step_id)
        flight.post(StepRecord(0, step_id, 0, (32,)))
        flight.agree(agreement)
        flight.begin_pass(0)
        flight.end_pass()
        flight.sample()
        flight.commit(step_id)
        flight.committed(step_id)

    def pair() -> None:
        for kind in (int(Kind.ALL_GATHER), int(Kind.REDUCE_SCATTER)):
            flight.enter(kind, 128, 4096)
            flight.leave()

    return NoteCosts(measure(step, 20_000).median_us, measure(pair, 20_000).median_us)


def tiny_config() -> EngineConfig:
    return EngineConfig(str(TINY_MODEL), launcher="thread", device="cpu", num_pages=400)


def tiny_layers() -> int:
    return plan_rank(tiny_config(), 0, "cpu").model.num_moe_layers


def time_steps(rounds: int) -> tuple[float, float]:
    """Medians of a step with and without notes, in microseconds of CPU time."""
    loop = tiny_loop()
    requests = (one_request(number) for number in range(REQUESTS))
    loop.step(Inbox(tuple(requests)), lambda updates: None)
    timed: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * rounds):
        noted = number % 2 == 0
        with ExitStack() as stack:
            if not noted:
                stack.enter_context(without_notes())
            for _ in range(BLOCK):
                start = thread_time()
                loop.step(Inbox(), lambda updates: None)
                timed[noted].append((thread_time() - start) * 1e6)
    return median(timed[True]), median(timed[False])


def tiny_loop() -> StepLoop:
    config = tiny_config()
    plan = plan_rank(config, 0, "cpu")
    loaded = load_rank(config, plan, lambda num_bytes: None)
    group = InProcessGroup(1, 60.0)
    flight = new_flight(config, plan)
    return assemble(config, plan, loaded, group.board(0), group.collective(0), flight)


def one_request(number: int) -> RankRequest:
    params = SamplingParams(max_tokens=100_000, temperature=0.0, ignore_eos=True)
    return RankRequest(number, (1, 2, 3), params, number, frozenset())


@contextmanager
def without_notes() -> Iterator[None]:
    with ExitStack() as stack:
        for name in NOTES:
            stack.enter_context(patch.object(FlightRecorder, name, lambda *arguments: None))
        yield


if __name__ == "__main__":
    main()
