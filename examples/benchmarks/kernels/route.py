"""How long routing takes on this GPU: the router's product, the choice, and the lists of pairs.

    python -m examples.benchmarks.kernels.route [--experts 128 256 512] [--tokens 8 64 ...]

Routers of Qwen3-30B-A3B (128 experts), Qwen3.5-35B-A3B (256) and 397B-A17B (512) in bf16; a quarter
of the experts is local. As a step finds them (harness/cold_timing.py), with a router for each call.
Cuts of the product are compiled beforehand in processes, and each must choose what the one in use
chooses but for roundings; the one in use also chooses by four warps a row. The best six are
printed, and the one in use.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
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
from examples.benchmarks.harness.cold_timing import CALLS, Call, ColdTimer
from examples.benchmarks.kernels.parallel_builds import compile_all

SHAPES = {128: (2048, 8), 256: (2048, 8), 512: (4096, 10)}  # experts: hidden, top k
BEST = 6
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


def ways(rows: int, num_experts: int) -> list[Way]:
    """First the one in use."""
    cuts = dict.fromkeys(tiles(rows, num_experts))
    in_use = choose_router_tile(rows, SHAPES[num_experts][0], num_experts)
    return [*(Way(num_experts, cut) for cut in cuts), Way(num_experts, in_use, num_warps=4)]


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--experts", type=int, nargs="+", choices=list(SHAPES),
                        default=list(SHAPES))  # fmt: skip
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 16, 64])
    parser.add_argument("--seconds", type=float, default=40.0, help="for all of it")
    parser.add_argument("--workers", type=int, default=min(24, os.cpu_count() or 1))
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    print(machine.describe("torch", "triton"), torch.cuda.get_device_name(), sep="\n", flush=True)
    points = list(product(args.experts, args.tokens))
    jobs = [way for num_experts, rows in points for way in ways(rows, num_experts)]
    compiled = compile_all(jobs, compile_one, args.workers, 0.6 * args.seconds)
    timer = ColdTimer.on(torch.device("cuda", 0))
    for num_experts, count in points:
        if time.monotonic() > deadline:
            print(f"{args.seconds:.0f} s are over: {num_experts} experts, {count} tokens are left")
            return
        compare(count, num_experts, compiled, timer)


def compile_one(way: Way) -> None:
    """Route one row that is not real."""
    hidden = SHAPES[way.num_experts][0]
    rows = torch.zeros(1, hidden, dtype=torch.bfloat16, device="cuda")
    row_ranges = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
    way.route(rows, rows.new_zeros(way.num_experts, hidden), row_ranges)
    torch.cuda.synchronize()


def compare(count: int, num_experts: int, compiled: set[Way], timer: ColdTimer) -> None:
    hidden = SHAPES[num_experts][0]
    routers = (torch.randn(CALLS, num_experts, hidden, device="cuda") * 0.02).bfloat16().unbind()
    rows = torch.randn(count, hidden, device="cuda").bfloat16()
    row_ranges = torch.tensor([[0], [count]], dtype=torch.int32, device="cuda")
    in_use, *others = ways(count, num_experts)
    due = in_use.route(rows, routers[0], row_ranges).local_ids

    def compared(way: Way) -> Call:
        found = way.route(rows, routers[0], row_ranges).local_ids
        wrong = float((found != due).float().mean())
        assert wrong < MOST_OTHERS, f"{wrong:.3g} of the choices are others"
        return lambda i: way.route(rows, routers[i], row_ranges)

    makes = ((way, partial(compared, way)) for way in (in_use, *others) if way in compiled)
    times = timer.times(makes, rows)
    print(f"{num_experts} experts, {count} tokens")
    ranked = sorted(times, key=times.__getitem__)
    for way in dict.fromkeys([*ranked[:BEST], *(way for way in ranked if way == in_use)]):
        mark = " (in use)" if way == in_use else ""
        print(f"  {times[way]:7.1f} us  {way}{mark}", flush=True)


if __name__ == "__main__":
    main()
