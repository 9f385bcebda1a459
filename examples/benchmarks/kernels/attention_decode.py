"""Attention of decodes and of verifications: which kernel reads the cache fastest, shape by shape.

    python -m examples.benchmarks.kernels.attention_decode [--shapes qwen3-30b-a3b] [--query-lens 1]

One layer, bf16, page 64, --context tokens of every request in the cache (uneven: log-uniform
128..4096), as a step finds it (harness/cold_timing.py), with a pool for each call. Candidates: XQA
as the runtime calls it, and our own kernel over shares of keys with the tiles that may be good,
which processes compile beforehand. Each is compared with XQA; what does not build or run is named
and left out. Floor: the bytes of keys and values at the measured rate. At the end of a shape, or
when --seconds are over: for each query length the tiles that are best over few and over many
requests, as rows of the table by which the runtime chooses (attention/trtllm/measured.py).
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import log
from statistics import mean

import numpy as np
import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm.kernel_groups import build_groups
from dp_runtime.kernels.jit_build import JitModule, KernelBuilds
from dp_runtime.kernels.split_attention import split_attention
from dp_runtime.kernels.split_tile import SplitTile
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.cold_timing import CALLS, ColdTimer
from examples.benchmarks.harness.device_timing import read_rate
from examples.benchmarks.kernels.attention_ragged import BF16, Load, load_of
from examples.benchmarks.kernels.parallel_builds import compile_all
from examples.benchmarks.kernels.split_candidates import Job, candidates, compile_one
from examples.benchmarks.kernels.trials import ALLOWED_ERROR, relative_error

SHAPES = {  # query heads, KV heads, head_dim
    "qwen3-30b-a3b": (32, 4, 128),
    "qwen3.5-35b-a3b": (16, 2, 256),
    "qwen3.5-397b-a17b": (32, 2, 256),
}
XQA = "XQA"
BEST = 5  # that are printed
FEW = 24  # requests: up to so many have a row of their own
COMPILE_SECONDS = 30.0
Call = Callable[[int], Tensor]  # of a layer


@dataclass(frozen=True)
class Point:
    """What is measured together."""

    query_len: int
    requests: int
    even: bool

    def __str__(self) -> str:
        lengths = "even" if self.even else "uneven"
        return f"{self.requests} requests of {self.query_len} rows, {lengths}"


@dataclass(frozen=True)
class Results:
    xqa: dict[Point, float] = field(default_factory=dict)  # microseconds
    split: dict[Point, dict[SplitTile, float]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, point: Point, times: dict[str | SplitTile, float]) -> None:
        for name, us in times.items():
            if isinstance(name, SplitTile):
                self.split[point][name] = us
            else:
                self.xqa[point] = us

    def rows(self, spec: AttentionSpec) -> Iterator[str]:
        """For each query length the tiles with the least times beside each load's best."""
        for query_len in sorted({point.query_len for point in self.xqa}):
            points_of = dict[SplitTile, list[Point]]()
            of_length = [p for p in self.xqa if p.query_len == query_len and self.split[p]]
            for few in (True, False):
                points = [point for point in of_length if (point.requests <= FEW) == few]
                tiles = [set(self.split[point]) for point in points]
                if tiles and set.intersection(*tiles):
                    tile = min(set.intersection(*tiles), key=partial(self._loss, points))
                    points_of.setdefault(tile, []).extend(points)
            for tile, points in points_of.items():
                times = ", ".join(self._times(points, tile))
                shape = f"{spec.head_dim}, {spec.group_size}, {query_len}"
                yield f"Measured({shape}, {tile}, ({times},)),"

    def _loss(self, points: list[Point], tile: SplitTile) -> float:
        return sum(log(self.split[p][tile] / min(self.split[p].values())) for p in points)

    def _times(self, points: list[Point], tile: SplitTile) -> Iterator[str]:
        for requests in sorted({point.requests for point in points}):
            some = [point for point in points if point.requests == requests]
            xqa, split = mean(self.xqa[p] for p in some), mean(self.split[p][tile] for p in some)
            yield f"({requests}, {xqa:.1f}, {split:.1f})"


def main() -> None:
    args = parse_args()
    end, device = time.monotonic() + args.seconds, torch.device("cuda", 0)
    specs = {name: spec_of(name, args.query_lens) for name in args.shapes}
    compiled = build(list(specs.values()), device)
    rate, timer = read_rate(), ColdTimer.on(device)
    print(machine.describe("torch", "triton", "flashinfer-python"))
    print(f"{torch.cuda.get_device_name()}, reads and writes {rate / 1e12:.2f} TB/s")
    for shape, spec in specs.items():
        print(f"{shape}: {end - time.monotonic():.0f} s are left")
        results = Results()
        for requests, query_len, even in product(args.requests, args.query_lens, args.lengths):
            point = Point(query_len, requests, even)
            if time.monotonic() > end:
                print(f"{args.seconds:.0f} s are over: {point} and what follows is not measured")
                break
            load = make_load(point, spec, args.context, device)
            results.add(point, measure(load, spec, point, compiled, timer, rate))
        print(*results.rows(spec), sep="\n", flush=True)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-30b-a3b"])
    parser.add_argument("--query-lens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 4, 128, 8, 32])
    parser.add_argument("--context", type=int, default=1152)
    parser.add_argument(
        "--lengths", nargs="+", choices=("even", "uneven"), default=["even", "uneven"]
    )
    parser.add_argument("--seconds", type=float, default=90.0, help="from the start of main on")
    args = parser.parse_args()
    args.lengths = [name == "even" for name in args.lengths]
    return args


def spec_of(shape: str, query_lens: list[int]) -> AttentionSpec:
    heads, kv_heads, head_dim = SHAPES[shape]
    return AttentionSpec(heads, kv_heads, head_dim, 64, BF16, BF16, frozenset(query_lens))


def build(specs: list[AttentionSpec], device: torch.device) -> set[Job]:
    """XQA for every shape and query length, while processes compile our own candidates."""
    from dp_runtime.attention.trtllm.sm90 import load_xqa

    shapes = [(spec, length) for spec in specs for length in sorted(spec.decode_query_lens)]
    xqa = [JitModule(f"XQA {shape}", partial(load_xqa, *shape)) for shape in shapes]
    jobs = {Job.of(*shape, tile): None for shape in shapes for tile in candidates(*shape)}
    with KernelBuilds(xqa, device) as builds:
        compiled = compile_all(jobs, compile_one, min(16, len(jobs)), COMPILE_SECONDS)
        builds.wait()
    return compiled


def make_load(point: Point, spec: AttentionSpec, context: int, device: torch.device) -> Load:
    lengths = np.full(point.requests, context, np.int32)
    if not point.even:
        drawn = np.random.default_rng(0).uniform(np.log(128), np.log(4096), point.requests)
        lengths = np.exp(drawn).astype(np.int32)
    query_lens = np.full(point.requests, point.query_len, np.int32)
    return load_of(query_lens, lengths, device, spec)


def measure(
    load: Load,
    spec: AttentionSpec,
    point: Point,
    compiled: set[Job],
    timer: ColdTimer,
    rate: float,
) -> dict[str | SplitTile, float]:
    """Compare all candidates with the first, and time them together; in microseconds."""
    found = list[Tensor]()  # by the first

    def compared(make: Callable[[], Call]) -> Call:
        call = make()
        rows = call(0)
        found[:] = found or [rows.clone()]
        error = relative_error(rows, found[0])
        assert error < ALLOWED_ERROR, f"differs from the first by {error:.3g}"
        return call

    makes = candidates_of(load, spec, point.query_len, compiled)
    times = timer.times(((name, partial(compared, make)) for name, make in makes), load.q)
    floor_us = load.kv_bytes / rate * 1e6
    print(f"{point}; floor {floor_us:.1f} us")
    ranked = sorted(times, key=times.__getitem__)
    for name in dict.fromkeys([*ranked[:BEST], *(name for name in ranked if name == XQA)]):
        us = times[name]
        print(f"  {us:7.1f} us  {us / floor_us:5.2f} x floor  {name}", flush=True)
    return times


def candidates_of(
    load: Load, spec: AttentionSpec, query_len: int, compiled: set[Job]
) -> Iterator[tuple[str | SplitTile, Callable[[], Call]]]:
    pools = torch.randn((CALLS, *load.pool.shape), dtype=BF16, device=load.q.device).unbind()
    own = load, spec, pools, load.q.clone()
    yield XQA, partial(by_xqa, *own)
    for tile in candidates(spec, query_len):
        if Job.of(spec, query_len, tile) in compiled:
            yield tile, partial(by_split, *own, tile)


def by_xqa(load: Load, spec: AttentionSpec, pools: tuple[Tensor, ...], out: Tensor) -> Call:
    from dp_runtime.attention.trtllm.sm90 import make_calls

    calls, scales = make_calls(spec, load.q.device), KvScales()
    (group,) = build_groups(load.metadata, spec.decode_query_lens)

    def call(layer: int) -> Tensor:
        calls.decode(load.q, pools[layer], scales, group, out)
        return out

    return call


def by_split(
    load: Load, spec: AttentionSpec, pools: tuple[Tensor, ...], out: Tensor, tile: SplitTile
) -> Call:
    metadata, scale = load.metadata, spec.head_dim**-0.5

    def call(layer: int) -> Tensor:
        table, lengths = metadata.page_table, metadata.seq_lens
        split_attention(load.q, pools[layer], table, lengths, scale, out, tile)
        return out

    return call


if __name__ == "__main__":
    main()
