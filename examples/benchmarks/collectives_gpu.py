"""Peer-to-peer kernels against NCCL: all-gather and reduce-scatter between the GPUs of a host.

    python examples/benchmarks/collectives_gpu.py [--rows 8 64 256 ...] [--hidden 2048]

A rank per GPU, each seeing only its own, bf16, inside CUDA graphs of 50 pairs (the kernels need
that a gather and a reduce-scatter alternate). Floor: the bytes a rank receives in both, at the
measured rate of a large copy from a peer.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from collectives.peer_to_peer import PeerToPeerGroup
from collectives.shared_memory import new_rendezvous_path
from collectives.torch_distributed import TorchDistributedGroup
from examples.benchmarks import machine
from examples.benchmarks.device_timing import captured, event_us
from examples.benchmarks.spawned import run_spawned

PAIRS = 50
TIMEOUT_S = 20.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 4096])
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    size = torch.cuda.device_count()
    if size < 2:
        sys.exit("at least two GPUs are needed")
    print(machine.describe("torch", "triton"), f"{size}x {torch.cuda.get_device_name()}", sep="\n")
    figures = {}
    for transport in ("peer_to_peer", "nccl"):
        with tempfile.TemporaryDirectory() as folder:
            where = new_rendezvous_path() if transport == "peer_to_peer" else f"file://{folder}/s"
            figures[transport] = run_spawned(run_rank, size, size, transport, where, args)
    print(f"{'rows a rank':>11}{'floor us':>10}{'peer_to_peer':>14}{'nccl':>8}{'ratio':>7}  "
          "(a pair of all-gather and reduce-scatter)")  # fmt: skip
    rate = peer_rate()
    for rows in args.rows:
        floor = 2 * (size - 1) * rows * args.hidden * 2 / rate * 1e6
        ours, theirs = figures["peer_to_peer"][rows], figures["nccl"][rows]
        print(f"{rows:>11}{floor:>10.1f}{ours:>14.1f}{theirs:>8.1f}{theirs / ours:>7.1f}")


def run_rank(
    rank: int, size: int, transport: str, address: str, args: argparse.Namespace, results: Any
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(rank)
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    group = (
        PeerToPeerGroup(address, rank, size, TIMEOUT_S, device)
        if transport == "peer_to_peer"
        else TorchDistributedGroup(address, rank, size, TIMEOUT_S, transport, device)
    )
    figures = {}
    for rows in args.rows:
        counts = (rows,) * size
        own = torch.randn(rows, args.hidden, device=device).bfloat16()
        partial = torch.randn(rows * size, args.hidden, device=device).bfloat16()

        def pair(own: Tensor = own, partial: Tensor = partial, counts: tuple = counts) -> None:
            group.collective.gather_rows(own, counts)
            group.collective.reduce_scatter_rows(partial, counts)

        figures[rows] = graph_us(pair, group.collective.barrier)
    if rank == 0:
        results.put(figures)
    group.close()


def graph_us(pair: Callable[[], None], barrier: Callable[[], None]) -> float:
    """Microseconds of one pair in a graph, the median of five replays that start together."""
    replay = captured(lambda: [pair() for _ in range(PAIRS)])
    times = []
    for _ in range(6):
        barrier()
        replay()  # the ranks come together in this one
        times.append(event_us(replay))
    return sorted(times[1:])[2] / PAIRS


def peer_rate() -> float:
    """Bytes a second of a large copy from another GPU."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:1")
    target = torch.empty(1 << 30, dtype=torch.uint8, device="cuda:0")
    target.copy_(source)
    torch.cuda.synchronize()
    with torch.cuda.device(0):
        return (1 << 30) / (event_us(lambda: target.copy_(source)) / 1e6)


if __name__ == "__main__":
    main()
