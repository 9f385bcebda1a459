"""Shared memory against Gloo: an all-gather and a reduce-scatter between CPU ranks of one host.

    python -m examples.benchmarks.collectives_cpu

Prints median and p99 of rank 0 for both, their ratio, and the distance from the floor: the time
one process needs to copy the bytes once that a rank must at least touch (the gathered rows).
One torch thread per rank.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from collectives.shared_memory.group import SharedMemoryGroup, new_rendezvous_path
from collectives.torch_distributed.group import TorchDistributedGroup
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.spawned import run_spawned
from examples.benchmarks.harness.timing import Times, measure

GOAL = 5.0  # times faster than Gloo, at the median


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    print(machine.describe("torch"), f"; load {os.getloadavg()[0]:.1f}")
    print(f"{args.ranks} ranks, {args.rows} rows x {args.hidden} float32 per rank, one thread each")
    floor = copy_floor(args)
    print(f"floor: {floor * 1e6:.1f} us to copy {args.ranks} x {args.rows} rows in one process")
    shared = run_ranks("shared_memory", new_rendezvous_path(), args, args.iterations)
    with tempfile.TemporaryDirectory() as folder:
        gloo = run_ranks("gloo", f"file://{folder}/store", args, args.gloo_iterations)
    print(f"{'':<16}{'':<15}{'median us':>10}{'p99 us':>10}{'x floor':>9}")
    for name in shared:
        for transport, times in (("shared_memory", shared[name]), ("gloo", gloo[name])):
            print(
                f"{name:<16}{transport:<15}{times.median_us:>10.1f}{times.p99_us:>10.1f}"
                f"{times.median_us / (floor * 1e6):>9.1f}"
            )
        ratio = gloo[name].median_us / shared[name].median_us
        print(f"{name:<16}speed-up {ratio:.1f}x (goal {GOAL:g}x: {verdict(ratio)})")


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=64, help="rows per rank")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--gloo-iterations", type=int, default=10_000)
    return parser.parse_args()


def verdict(ratio: float) -> str:
    return "met" if ratio >= GOAL else "missed"


def copy_floor(args: argparse.Namespace) -> float:
    """Seconds to copy the gathered rows once, median."""
    source = torch.randn(args.ranks * args.rows, args.hidden)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), 2000).median_us / 1e6


def run_ranks(
    transport: str, address: str, args: argparse.Namespace, iterations: int
) -> dict[str, Times]:
    """Run both collectives on spawned ranks; the times of rank 0."""
    place = (transport, address, args.ranks, args.rows, args.hidden, iterations)
    times: dict[str, Times] = run_spawned(run_rank, args.ranks, *place)
    return times


def run_rank(
    dp_rank: int, transport: str, address: str, dp_size: int, rows: int, hidden: int,
    iterations: int, results: Any,
) -> None:  # fmt: skip
    torch.set_num_threads(1)
    gc.freeze()  # torch's objects are many, and every full collection would walk them
    group_type: Any = SharedMemoryGroup if transport == "shared_memory" else TorchDistributedGroup
    group = group_type(address, dp_rank, dp_size, 60.0)
    counts = (rows,) * dp_size
    own, partial = torch.randn(rows, hidden), torch.randn(dp_size * rows, hidden)
    operations: dict[str, Callable[[], Any]] = {
        "gather": lambda: group.collective.all_gather(own, counts),
        "reduce_scatter": lambda: group.collective.reduce_scatter(partial, counts),
    }
    times = {}
    for name, operation in operations.items():
        group.collective.barrier()
        times[name] = measure(operation, iterations, warmup=min(200, iterations))
    group.collective.barrier()
    if dp_rank == 0:
        results.put(times)
    time.sleep(0.1)  # let peers leave the barrier before connections close
    group.close()


if __name__ == "__main__":
    main()
