"""Which tiles of the expert kernels are fastest on this GPU, for each shape and number of tokens.

    python -m examples.benchmarks.kernels.tune_experts [--shapes ep4 ...] [--tokens 16 ...] [--fp8]

Shapes of moe_stage.py in bf16 (--fp8: weights in e4m3), uniform random routing. Candidates are
compiled beforehand in processes, checked against plain torch, and timed in CUDA graphs with four
weight sets in turn. For each product the best three of each kind are printed as
`expert_tiles.Tile`s, with their rate and how far they are from the floor; then the parts of the
stage with the best of both, beside those of the tiles in use. What does not compile or fit is named
and skipped; a shape ends after --seconds, with what it has found.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.kernels.expert_tiles import ExpertTiles, Tile, choose_tiles
from dp_runtime.kernels.experts import Activated, down_pairs, gate_up_pairs, run_experts
from dp_runtime.kernels.moe_router import Routing, route
from dp_runtime.layers.experts import Experts
from dp_runtime.weights.fp8_blocks import BLOCK, dequantize
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import describe_gpu, graph_us, matmul_rate, read_rate
from examples.benchmarks.kernels.expert_candidates import Job, candidates, compile_all
from examples.benchmarks.kernels.moe_stage import SETS, SHAPES, Shard, to_fp8
from examples.benchmarks.kernels.trials import relative_error, try_all

TOKENS = (16, 64, 128, 256, 512, 1024, 4096, 8192, 16384, 32768)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["ep4"])
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--fp8", action="store_true", help="not with --shapes tp4")
    parser.add_argument("--in-use", action="store_true", help="time the tiles in use only")
    parser.add_argument("--seconds", type=float, default=90.0, help="for each shape")
    parser.add_argument("--workers", type=int, default=min(24, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.fp8 and not all(SHAPES[shape].has_whole_blocks for shape in args.shapes):
        parser.error(f"--fp8 takes shapes of whole blocks of {BLOCK}: all but tp4")
    torch.manual_seed(0)
    say(machine.describe("torch", "triton"), describe_gpu())
    rates = read_rate(), matmul_rate()
    for name in args.shapes:
        deadline = time.monotonic() + args.seconds
        compiled = compile_all(
            name, args.tokens, args.fp8, args.in_use, args.workers, args.seconds / 3
        )
        bench = Bench.make(name, args.fp8, *rates)
        for i, tokens in enumerate(args.tokens):
            now = time.monotonic()
            share = (deadline - now) / (len(args.tokens) - i)
            tune(bench, tokens, compiled, args.in_use, now + share)
        del bench
        torch.cuda.empty_cache()


def say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)


@dataclass(frozen=True, eq=False)
class Bench:
    """Four layers' weights of one shard, and the machine's rates: bytes and operations a second."""

    name: str
    shard: Shard
    fp8: bool
    routers: list[Tensor]
    experts: list[Experts]
    read_rate: float
    matmul_rate: float

    @classmethod
    def make(cls, name: str, fp8: bool, read_rate: float, matmul_rate: float) -> Bench:
        shard = SHAPES[name]

        def random(*shape: int) -> list[Tensor]:
            return [torch.randn(shape, device="cuda").bfloat16() * 0.02 for _ in range(SETS)]

        gate_up = random(shard.num_local, 2 * shard.intermediate, shard.hidden)
        down = random(shard.num_local, shard.hidden, shard.intermediate)
        experts = [Experts(*pair, 0) for pair in zip(gate_up, down)]
        if fp8:
            experts = [to_fp8(each) for each in experts]
        routers = random(shard.num_experts, shard.hidden)
        return cls(name, shard, fp8, routers, experts, read_rate, matmul_rate)

    def route(self, rows: Tensor, row_ranges: Tensor, i: int) -> Routing:
        top_k, num_local = self.shard.top_k, self.shard.num_local
        return route(rows, self.routers[i], row_ranges, top_k, True, 0, num_local)

    def gate_up(
        self, i: int, rows: Tensor, routing: Routing, tile: Tile, with_peaks: bool
    ) -> Activated:
        own = self.experts[i]
        scales = own.scales.gate_up if own.scales else None
        return gate_up_pairs(rows, own.gate_up, routing, tile, scales, with_peaks)

    def down(self, i: int, activated: Activated, routing: Routing, tile: Tile) -> Tensor:
        own = self.experts[i]
        return down_pairs(
            activated, own.down, routing, tile, own.scales.down if own.scales else None
        )

    def activated(self, values: Tensor) -> Activated:
        if not self.fp8:
            return Activated(values, None)
        return Activated(values, values.unflatten(1, (-1, BLOCK)).abs().amax(-1).float())

    def wide(self) -> tuple[Tensor, Tensor]:
        """Gate-up and down of the first layer, as bf16."""
        own = self.experts[0]
        if own.scales is None:
            return own.gate_up, own.down
        pairs = (own.gate_up, own.scales.gate_up), (own.down, own.scales.down)
        gate_up, down = (
            torch.stack([dequantize(v, s).bfloat16() for v, s in zip(*pair)]) for pair in pairs
        )
        return gate_up, down


@dataclass(frozen=True, eq=False)
class Product:
    """One product of the stage: how it is run, what is due, and its floor."""

    halves: int
    run: Callable[[int, Tile], Tensor]
    due: Tensor
    index: Callable[[Tile], Tensor]  # rows of the result that are due
    flops: float
    bytes: float
    floor_us: float

    def error(self, tile: Tile) -> float:
        return relative_error(self.run(0, tile)[self.index(tile)], self.due)

    def us(self, tile: Tile) -> float:
        return graph_us(lambda i: self.run(i, tile), SETS, 3)

    def describe(self, tile: Tile, us: float) -> str:
        rates = f"{self.flops / us / 1e6:6.0f} TFLOP/s {self.bytes / us / 1e6:5.2f} TB/s"
        return f"{us:8.1f} us  {rates}  {us / self.floor_us:5.2f} x floor  {tile}"


def tune(bench: Bench, tokens: int, compiled: set[Job], only_in_use: bool, deadline: float) -> None:
    shard = bench.shard
    rows = torch.randn(tokens, shard.hidden, device="cuda").bfloat16()
    row_ranges = torch.tensor([[0], [tokens]], dtype=torch.int32, device="cuda")
    routings = [bench.route(rows, row_ranges, i) for i in range(SETS)]
    per_expert = tokens * shard.top_k / shard.num_experts
    say(f"{bench.name}, {tokens} tokens, {per_expert:g} pairs an expert")
    best: dict[tuple[bool, int], tuple[float, Tile]] = {}  # by expert, halves
    for part in () if only_in_use else products(bench, rows, routings):
        middle = time.monotonic() + (deadline - time.monotonic()) * (0.5 if part.halves == 2 else 1)
        ranked = rank(part, bench, tokens, compiled, middle)
        for by_expert in (True, False):
            some = [(us, tile) for us, tile in ranked if tile.by_expert == by_expert]
            for us, tile in some[:3]:
                say(f"  {('down', 'gate_up')[part.halves - 1]:<8}{part.describe(tile, us)}")
            if some:
                best[by_expert, part.halves] = some[0]
    for by_expert in (True, False):
        both = [best.get((by_expert, halves)) for halves in (2, 1)]
        if both[0] is not None and both[1] is not None:
            tiles = ExpertTiles(both[0][1], both[1][1])
            whole(bench, rows, row_ranges, routings, tiles, "best")
    in_use = choose_tiles(tokens, shard.top_k, shard.num_experts, shard.intermediate, bench.fp8)
    whole(bench, rows, row_ranges, routings, in_use, "in use")


def rank(
    part: Product, bench: Bench, tokens: int, compiled: set[Job], deadline: float
) -> list[tuple[float, Tile]]:
    """Candidates by their time; those that are wrong or fail are named and left out."""
    tiles = [
        tile
        for tile in candidates(bench.shard, tokens, part.halves, bench.fp8)
        if Job.for_tile(bench.name, part.halves, tile, bench.fp8) in compiled
    ]
    torch.manual_seed(tokens)
    found = try_all(tiles, part.error, part.us, deadline)
    return [(us, tile) for tile, us in found.items()]


def products(bench: Bench, rows: Tensor, routings: list[Routing]) -> Iterator[Product]:
    """Gate-up, then down over what gate-up gives."""
    first = routings[0]
    counts = first.counts.tolist()
    index = torch.cat([first.pairs[e, :count] for e, count in enumerate(counts)]).long()
    ends = first.counts.cumsum(0, dtype=torch.int32)
    wide_gate_up, wide_down = bench.wide()
    top_k, hidden = bench.shard.top_k, bench.shard.hidden
    half = F.grouped_mm(rows[index // top_k], wide_gate_up.transpose(1, 2), offs=ends)
    gate, up = half.chunk(2, -1)
    activated = F.silu(gate) * up
    down = F.grouped_mm(activated, wide_down.transpose(1, 2), offs=ends)
    weighted = (down.float() * first.weights.flatten()[index, None]).to(rows.dtype)
    del half, gate, up, down, wide_gate_up, wide_down
    in_order = activated.new_zeros(len(rows) * top_k, activated.shape[1])
    in_order[: len(activated)] = activated
    at_pairs = torch.zeros_like(in_order).index_copy_(0, index, activated)
    by_pair, by_expert = bench.activated(at_pairs), bench.activated(in_order)
    active = sum(int((routing.counts > 0).sum()) for routing in routings) / SETS
    pairs = sum(int(routing.counts.sum()) for routing in routings) / SETS
    order = torch.arange(len(index), device="cuda")

    def make(
        halves: int,
        due: Tensor,
        where: Callable[[Tile], Tensor],
        run: Callable[[int, Tile], Tensor],
    ) -> Product:
        one = halves * activated.shape[1] * hidden
        flops, read = 2 * one * pairs, bench.experts[0].down.itemsize * one * active
        floor = max(flops / bench.matmul_rate, read / bench.read_rate) * 1e6
        return Product(halves, run, due, where, flops, read, floor)

    yield make(
        2, activated, lambda tile: index if tile.by_expert else order,
        lambda i, tile: bench.gate_up(i, rows, routings[i], tile, tile.f16).values,
    )  # fmt: skip
    # NOTE: the pairs of another set are as many as its own counts say; their inputs may be zeros.
    yield make(
        1, weighted, lambda tile: index,
        lambda i, tile: bench.down(
            i, by_pair if tile.by_expert else by_expert, routings[i], tile
        ),
    )  # fmt: skip


def whole(
    bench: Bench,
    rows: Tensor,
    row_ranges: Tensor,
    routings: list[Routing],
    tiles: ExpertTiles,
    name: str,
) -> None:
    """The parts of the stage with tiles of one kind, and all of it."""

    def pairs(i: int, routing: Routing) -> Tensor:
        activated = bench.gate_up(i, rows, routing, tiles.gate_up, tiles.down.f16)
        return bench.down(i, activated, routing, tiles.down)

    def stage(i: int) -> Tensor:
        routing = bench.route(rows, row_ranges, i)
        own = bench.experts[i]
        return run_experts(rows, own.gate_up, own.down, routing, tiles, own.scales)

    runs: dict[str, Callable[[int], object]] = {
        "router by cuBLAS": lambda i: F.linear(rows, bench.routers[i]),
        "route": lambda i: bench.route(rows, row_ranges, i),
        "products": lambda i: pairs(i, routings[i]),
        "stage": stage,
    }
    floor = sum(product.floor_us for product in products(bench, rows, routings))
    kind = "by expert" if tiles.down.by_expert else "counted"
    found = [f"floor {floor:.1f}"]
    for part, run in runs.items():
        try:
            found.append(f"{part} {graph_us(run, SETS, 3):.1f}")
        except Exception as error:
            found.append(f"{part} FAILED {type(error).__name__}: {str(error)[:80]}")
    say(f"  us, {name}, {kind}: " + "; ".join(found))


if __name__ == "__main__":
    main()
