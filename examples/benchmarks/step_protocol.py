"""What agreeing on a step costs by itself: post a record, read all ranks' records, fold them.

    python -m examples.benchmarks.step_protocol
    python -m examples.benchmarks.step_protocol --board gloo --steps 2000

Prints median and p99 of rank 0, in microseconds.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import threading
import time
from typing import Any

import torch

from collectives.in_process import InProcessGroup
from collectives.shared_memory.group import SharedMemoryGroup, new_rendezvous_path
from collectives.torch_distributed.group import TorchDistributedGroup
from dp_runtime.core.step_program import SERVING_PROGRAMS
from dp_runtime.parallel.agreement import StepRecord, agree
from dp_runtime.parallel.step_board import StepBoard
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.spawned import run_spawned
from examples.benchmarks.harness.timing import Times, measure

GOAL_US = 150.0


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), f"; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        match args.board:
            case "shared_memory":
                times = run_processes(args, new_rendezvous_path())
            case "gloo":
                times = run_processes(args, f"file://{folder}/store")
            case _:
                times = run_threads(args)
    print(
        f"{args.board}, {args.ranks} ranks, {args.steps} steps: exchange and agree take "
        f"{times.median_us:.1f} us at the median, {times.p99_us:.1f} us at p99 "
        f"(goal {GOAL_US:g} us at the median over shared memory)"
    )


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10_000)
    boards = ("shared_memory", "gloo", "in_process")
    parser.add_argument("--board", choices=boards, default="shared_memory")
    return parser.parse_args()


def run_processes(args: argparse.Namespace, address: str) -> Times:
    """Spawn the ranks; the times of rank 0."""
    place = (address, args.ranks, args.board, args.steps)
    times: Times = run_spawned(run_rank, args.ranks, *place)
    return times


def run_rank(
    dp_rank: int, address: str, dp_size: int, board: str, steps: int, results: Any
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # torch's objects are many, and every full collection would walk them
    group_type: Any = TorchDistributedGroup if board == "gloo" else SharedMemoryGroup
    group = group_type(address, dp_rank, dp_size, 60.0)
    times = take_steps(group.board, steps)
    if dp_rank == 0:
        results.put(times)
    time.sleep(0.1)  # let peers finish their last step before connections close
    group.close()


def run_threads(args: argparse.Namespace) -> Times:
    """The same with one thread per rank."""
    group = InProcessGroup(args.ranks, 60.0)
    times: dict[int, Times] = {}

    def run(rank: int) -> None:
        times[rank] = take_steps(group.board(rank), args.steps)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(args.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times[0]


def take_steps(board: StepBoard, steps: int) -> Times:
    """Agree on step after step, as the runtime does, without running any."""
    step = 0

    def one() -> None:
        nonlocal step
        step += 1
        record = StepRecord(0, step, 0, (board.dp_rank,), queued_tokens=step)
        agree(board.all_gather_records(record), SERVING_PROGRAMS)

    return measure(one, steps)


if __name__ == "__main__":
    main()
