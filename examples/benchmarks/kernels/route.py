"""How long routing takes on this GPU: the router's product, the choice, and the lists of pairs.

    python -m examples.benchmarks.kernels.route [--experts 128 256 512] [--tokens 8 64 ...]

Routers of Qwen3-30B-A3B (128 experts), Qwen3.5-35B-A3B (256) and 397B-A17B (512) in bf16; a quarter
of the experts is local. In CUDA graphs with 24 routers in turn: those of 397B don't stay in the L2,
the others do. Cuts of the product are compiled beforehand in processes, and each must choose what
the one in use chooses but for roundings; then the fastest is timed with four warps a row. The best
five are printed, and the one in use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.kernels.moe_router import (
    RouterTile,
    Routing,
    choose_experts,
    choose_router_tile,
    logits_in_parts,
)
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import graph_us
from examples.benchmarks.kernels.parallel_builds import compile_all
from examples.benchmarks.kernels.trials import try_all

SHAPES = {128: (2048, 8), 256: (2048, 8), 512: (4096, 10)}  # experts: hidden, top k
SETS = 24
MOST_OTHERS = 0.03  # of the choices; sums in another order round some logits to another bf16


@dataclass(frozen=True)
class Way:
    """One way to route; a tile of None: the product by cuBLAS."""

    num_experts: int
    tile: RouterTile | None
    num_warps: int = 1

    def route(self, rows: Tensor, router: Tensor, row_ranges: Tensor) -> Routing:
        top_k, num_local = SHAPES[self.num_experts][1], self.num_experts // 4
        device = rows.device
        routing = Routing(
            weights=torch.empty(len(rows), top_k, device=device),
            local_ids=torch.empty(len(rows), top_k, dtype=torch.int32, device=device),
            counts=torch.empty(num_local, dtype=torch.int32, device=device),
            pairs=torch.empty(num_local, len(rows), dtype=torch.int32, device=device),
        )
        parts = logits_in_parts(rows, router, routing.counts, self.tile)
        choose_experts(parts, router, row_ranges, True, 0, routing, num_warps=self.num_warps)
        return routing

    def __str__(self) -> str:
        cut = "cuBLAS" if self.tile is None else str(self.tile)
        return f"{cut}, {self.num_warps} warps a row"


def tiles(rows: int, num_experts: int) -> Iterator[RouterTile | None]:
    """Cuts that may be good, first the one in use."""
    hidden = SHAPES[num_experts][0]
    yield choose_router_tile(rows, hidden, num_experts)
    yield None
    for block_m in (16, 32, 64, 128):
        blocks = -(-rows // block_m) * -(-num_experts // 128)
        for split in (128, 256, 512, 1024, 2048):
            fits = block_m / 2 <= rows <= 8 * block_m and split <= hidden
            if fits and 32 <= blocks * (hidden // split) <= 512:
                yield RouterTile(block_m, split)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", choices=list(SHAPES),
                        default=list(SHAPES))  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+",
                        default=[8, 64, 256, 512, 1024, 2048])  # fmt: skip
    parser.add_argument("--seconds", type=float, default=25.0, help="for all of it")
    parser.add_argument("--workers", type=int, default=min(24, os.cpu_count() or 1))
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    print(machine.describe("torch", "triton"), torch.cuda.get_device_name(), sep="\n", flush=True)
    jobs = [
        Way(num_experts, tile, num_warps)
        for num_experts in args.experts
        for rows in args.tokens
        for tile in tiles(rows, num_experts)
        for num_warps in (1, 4)
    ]
    compiled = compile_all(jobs, compile_one, args.workers, 0.6 * args.seconds)
    for num_experts in args.experts:
        hidden = SHAPES[num_experts][0]
        shape = SETS, num_experts, hidden
        routers = (torch.randn(shape, device="cuda") * 0.02).bfloat16().unbind()
        for count in args.tokens:
            if time.monotonic() > deadline:
                return
            compare(count, routers, compiled, deadline)


def compile_one(way: Way) -> None:
    """Route one row that is not real."""
    hidden = SHAPES[way.num_experts][0]
    rows = torch.zeros(1, hidden, dtype=torch.bfloat16, device="cuda")
    row_ranges = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    way.route(rows, rows.new_zeros(way.num_experts, hidden), row_ranges)
    torch.cuda.synchronize()


def compare(count: int, routers: Sequence[Tensor], compiled: set[Way], deadline: float) -> None:
    num_experts, hidden = routers[0].shape
    rows = torch.randn(count, hidden, device="cuda").bfloat16()
    row_ranges = torch.tensor([[0], [count]], dtype=torch.int32, device="cuda")
    ways = [Way(num_experts, tile) for tile in dict.fromkeys(tiles(count, num_experts))]
    in_use, due = ways[0], ways[0].route(rows, routers[0], row_ranges)
    parts = logits_in_parts(rows, routers[0], due.counts, in_use.tile)
    alone: dict[str, Callable[[int], object]] = {
        "product by cuBLAS": lambda i: F.linear(rows, routers[i]),
        "product in use": lambda i: logits_in_parts(rows, routers[i], due.counts, in_use.tile),
        "choice": lambda i: choose_experts(parts, routers[0], row_ranges, True, 0, due),
    }
    times_alone = (f"{name} {graph_us(run, SETS, 3):.1f}" for name, run in alone.items())
    print(f"{num_experts} experts, {count} tokens; alone, us:", "; ".join(times_alone))

    def others(way: Way) -> float:
        found = way.route(rows, routers[0], row_ranges)
        return float((found.local_ids != due.local_ids).float().mean())

    def timed(ways: Iterable[Way]) -> dict[Way, float]:
        some = [way for way in ways if way in compiled]
        return try_all(
            some,
            others,
            lambda way: graph_us(lambda i: way.route(rows, routers[i], row_ranges), SETS, 3),
            deadline,
            MOST_OTHERS,
        )

    times = timed(ways)
    best = min(times, key=times.__getitem__, default=in_use)
    times |= timed({replace(way, num_warps=4) for way in (best, in_use)})
    ranked = sorted(times, key=times.__getitem__)
    for way in dict.fromkeys([*ranked[:5], *(way for way in ranked if way == in_use)]):
        mark = " (in use)" if way == in_use else ""
        print(f"  {times[way]:7.1f} us  {way}{mark}", flush=True)


if __name__ == "__main__":
    main()
