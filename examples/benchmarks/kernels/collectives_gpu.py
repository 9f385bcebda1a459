"""Peer-to-peer kernels against NCCL: all-gather and reduce-scatter between the GPUs of a host.

    python -m examples.benchmarks.kernels.collectives_gpu [--rows 8 64 256 ...] [--hidden 2048]

A rank per GPU, each seeing only its own, bf16, inside CUDA graphs of 50 pairs (the kernels need
that a gather and a reduce-scatter alternate). A pair is timed as eager steps move rows, over both
transports, and as a MoE stage of a graph does, by real rows that the device reads: `counted`, with
all rows real, and with a quarter of them. In the last columns one of the two, or both, have no row
that is real. Floor: the bytes a rank receives in both, at the measured rate of a large copy from a
peer.

Then each operation over NCCL as nccl-tests measures it (doc/PERFORMANCE.md there): 5 calls to warm
up, 20 one after another, out of place, launched by the host and replayed in a graph; bus bandwidth
= gathered bytes / time * (n - 1) / n. NCCL's version and settings are printed beside.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from collectives.peer_to_peer.group import PeerToPeerGroup
from collectives.shared_memory.group import new_rendezvous_path
from collectives.torch_distributed.group import TorchDistributedGroup
from collectives.torch_distributed.nccl import ENVIRONMENT
from dp_runtime.parallel.collective import DeviceCountCollective, RowCollective
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import captured, event_us
from examples.benchmarks.harness.spawned import run_spawned

PAIRS = 50
WARM_UP, CALLS = 5, 20  # of nccl-tests
OPERATIONS = ("all_gather", "reduce_scatter")
TIMEOUT_S = 20.0
ALONE = ("gather", "scatter", "neither")  # the other one is empty, or both
COLUMNS = ("nccl", "peer_to_peer", "counted", "a quarter", *ALONE)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256, 1024, 4096])
    parser.add_argument("--hidden", type=int, default=2048)
    args = parser.parse_args()
    size = torch.cuda.device_count()
    if size < 2:
        sys.exit("at least two GPUs are needed")
    print(machine.describe("torch", "triton"), f"{size}x {torch.cuda.get_device_name()}", sep="\n")
    figures: dict[int, dict[str, float]] = {rows: {} for rows in args.rows}
    for transport in ("peer_to_peer", "nccl"):
        with tempfile.TemporaryDirectory() as folder:
            where = new_rendezvous_path() if transport == "peer_to_peer" else f"file://{folder}/s"
            found = run_spawned(run_rank, size, size, transport, where, args)
            for rows in args.rows:
                figures[rows] |= found[rows]
    print("microseconds of a pair of all-gather and reduce-scatter")
    print(f"{'rows a rank':>11}{'floor':>8}" + "".join(f"{name:>14}" for name in COLUMNS))
    rate = peer_rate()
    for rows in args.rows:
        floor = 2 * (size - 1) * rows * args.hidden * 2 / rate * 1e6
        times = "".join(f"{figures[rows][name]:>14.1f}" for name in COLUMNS)
        print(f"{rows:>11}{floor:>8.1f}{times}")
    report_nccl(figures, size, args)


@dataclass(frozen=True, eq=False)
class Rows:
    """A rank's rows, and its partial sums of all ranks' rows."""

    counts: tuple[int, ...]
    own: Tensor  # [rows, hidden]
    partial: Tensor  # [dp_size * rows, hidden]

    @classmethod
    def make(cls, rows: int, size: int, hidden: int, device: torch.device) -> Rows:
        return cls(
            (rows,) * size,
            torch.randn(rows, hidden, device=device).bfloat16(),
            torch.randn(size * rows, hidden, device=device).bfloat16(),
        )

    def eager(self, collective: RowCollective) -> None:
        collective.all_gather(self.own, self.counts)
        collective.reduce_scatter(self.partial, self.counts)

    def counted(
        self, collective: DeviceCountCollective, gathered: int, scattered: int
    ) -> Callable[[], None]:
        """So many real rows of every rank."""
        rows, size = self.counts[0], len(self.counts)
        starts = [rank * rows for rank in range(size)]
        there, back = (
            torch.tensor([starts, [real] * size], dtype=torch.int32, device=self.own.device)
            for real in (gathered, scattered)
        )

        sums = torch.empty_like(self.own)

        def pair() -> None:
            collective.all_gather_v(self.own, there, size * rows, rows, False)
            collective.reduce_scatter_v(self.partial, back, sums, rows)

        return pair


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
    collective, figures = group.collective, {}
    for count in args.rows:
        rows = Rows.make(count, size, args.hidden, device)
        pairs: dict[str, Callable[[], None]] = {transport: partial(rows.eager, collective)}
        if isinstance(collective, DeviceCountCollective):
            quarter = -(-count // 4)
            pairs["counted"] = rows.counted(collective, count, count)
            pairs["a quarter"] = rows.counted(collective, quarter, quarter)
            pairs["gather"] = rows.counted(collective, count, 0)
            pairs["scatter"] = rows.counted(collective, 0, count)
            pairs["neither"] = rows.counted(collective, 0, 0)
        figures[count] = {name: graph_us(pair, collective.barrier) for name, pair in pairs.items()}
        if transport == "nccl":
            figures[count] |= nccl_tests_us(rows, collective)
    if rank == 0:
        results.put(figures)
    group.close()


def graph_us(pair: Callable[[], None], barrier: Callable[[], None]) -> float:
    """Microseconds of one pair in a graph, the median of five replays that start together."""

    def run_pairs() -> None:
        for _ in range(PAIRS):
            pair()

    replay = captured(run_pairs)
    times = []
    for _ in range(6):
        barrier()
        replay()  # the ranks come together in this one
        times.append(event_us(replay))
    return sorted(times[1:])[2] / PAIRS


def nccl_tests_us(rows: Rows, collective: RowCollective) -> dict[str, float]:
    """Microseconds of a call of each operation, by name and way."""
    operations = (
        partial(collective.all_gather, rows.own, rows.counts),
        partial(collective.reduce_scatter, rows.partial, rows.counts),
    )
    found = {}
    for name, call in zip(OPERATIONS, operations, strict=True):
        ways: dict[str, Callable[[], object]] = {
            "eager": partial(repeat, call, CALLS),
            "graph": captured(partial(repeat, call, CALLS)),
        }
        for way, calls in ways.items():
            repeat(call, WARM_UP)
            calls()
            collective.barrier()
            found[f"{name} {way}"] = event_us(calls) / CALLS
    return found


def repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def report_nccl(figures: dict[int, dict[str, float]], size: int, args: argparse.Namespace) -> None:
    version = ".".join(map(str, torch.cuda.nccl.version()))
    settings = ENVIRONMENT | {k: v for k, v in os.environ.items() if "NCCL" in k}
    print(f"NCCL {version}, settings {settings}; as nccl-tests measures: us (GB/s)")
    names = [f"{name} {way}" for name in OPERATIONS for way in ("eager", "graph")]
    print(f"{'rows a rank':>11}" + "".join(f"{name:>24}" for name in names))
    for rows in args.rows:
        moved = size * rows * args.hidden * 2 * (size - 1) / size
        cells = (
            f"{figures[rows][name]:.1f} ({moved / figures[rows][name] / 1e3:.1f})" for name in names
        )
        print(f"{rows:>11}" + "".join(f"{cell:>24}" for cell in cells))


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
