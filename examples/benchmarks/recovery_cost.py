"""What it costs a rank that it can be replaced, while nothing fails.

    python -m examples.benchmarks.recovery_cost

A step itself does nothing for it: what a successor needs is what the driver was told anyway. What
is left is the question that each rank answers every half second. Prints the median CPU time of one
answer on a rank that decodes, with the message read and the answer written, and its share of all
time, and so of any step; the floor is no question at all.
"""

from __future__ import annotations

import os
from time import sleep, thread_time
from typing import Any

import numpy as np

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.cli.model_choice import TINY_MODEL
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from workers.messages import Call, ReadHealth, Reply
from workers.supervision.watch import BEAT_S

GOAL = 0.01


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), f"; load {os.getloadavg()[0]:.1f}")
    endless = SamplingParams(max_tokens=args.tokens, ignore_eos=True, temperature=0.0)
    config = EngineConfig(str(TINY_MODEL), dp_size=args.dp_size, launcher="thread", device="cpu")
    with Engine(config) as engine:
        handles = [engine.submit([3, 4, 5], endless) for _ in range(args.requests)]
        worker = _worker(engine)
        costs = [_answer_s(worker) for _ in range(args.answers)]
        for handle in handles:
            assert not handle.done, "requests ended early: raise --tokens"
            handle.abort()
    p50, p99 = np.percentile(costs, [50, 99])
    share = p50 / BEAT_S
    print(f"an answer: p50 {p50 * 1e6:.0f} us, p99 {p99 * 1e6:.0f} us of CPU time")
    print(f"one in {BEAT_S:g} s: {share:.4%} of a rank's time, {GOAL / share:.0f} times below 1 %")


def _worker(engine: Engine) -> Any:
    group: Any = engine._core._group
    return group._ranks.seats[0].handle.worker


def _answer_s(worker: Any) -> float:
    """Do what a rank's process does for one question."""
    call = Call.with_message(1, ReadHealth())
    sleep(0.001)  # for the rank to step meanwhile
    started = thread_time()
    Reply.with_answer(call.call_id, worker.answer(call.message), None)
    return thread_time() - started


def parse_args() -> Any:
    parser = new_parser(__doc__)
    parser.add_argument("--dp-size", type=int, default=2)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=1900)
    parser.add_argument("--answers", type=int, default=300)
    return parser.parse_args()


if __name__ == "__main__":
    main()
