"""Attention of decodes and of verifications: which kernel reads the cache fastest, shape by shape.

    python -m examples.benchmarks.kernels.attention_decode [--shape qwen3-30b-a3b] [--query-lens 1]

One layer, bf16, page 64, --context tokens of every request in the cache (uneven: log-uniform
128..4096), several layers' pools in turn in a CUDA graph. Candidates: XQA as the runtime calls it,
FMHAv2, our own kernel over shares of keys with the tiles that may be good, which processes compile
beforehand, and with --native flashinfer's FA2 and FA3 by its prefill wrapper. Each is compared with
XQA, and printed when it is measured; what does not build or run is named and left out. Floor: the
bytes of keys and values at the measured rate. At the end, or when --seconds are over: for each
query length the tile that is best over all loads, as a row of the table by which the runtime
chooses (dp_runtime/attention/trtllm/measured.py).
"""

from __future__ import annotations

import argparse
import os
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

from dp_runtime.attention.contract import offsets
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_groups import build_groups
from dp_runtime.kernels.jit_build import KernelBuilds
from dp_runtime.kernels.split_attention import split_attention
from dp_runtime.kernels.split_tile import SplitTile
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import graph_us, read_rate
from examples.benchmarks.kernels.attention_ragged import BF16, Load, load_of
from examples.benchmarks.kernels.parallel_builds import compile_all
from examples.benchmarks.kernels.split_candidates import Job, candidates, compile_one
from examples.benchmarks.kernels.trials import ALLOWED_ERROR, relative_error

SHAPES = {  # query heads, KV heads, head_dim
    "qwen3-30b-a3b": (32, 4, 128),
    "qwen3.5-35b-a3b": (16, 2, 256),
    "qwen3.5-397b-a17b": (32, 2, 256),
}
LAYERS = 4
WORKSPACE_BYTES = 256 << 20
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

    def rows(self, spec: AttentionSpec) -> Iterator[str]:
        """For each query length the tile with the least times beside each load's best."""
        for query_len in sorted({point.query_len for point in self.split}):
            points = [p for p in self.xqa if p.query_len == query_len and self.split[p]]
            tiles = set.intersection(*(set(self.split[point]) for point in points))
            if tiles:
                tile = min(tiles, key=partial(self._loss, points))
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
    heads, kv_heads, head_dim = SHAPES[args.shape]
    spec = AttentionSpec(heads, kv_heads, head_dim, 64, BF16, BF16, frozenset(args.query_lens))
    own = [Job.of(spec, length, t) for length in args.query_lens for t in candidates(spec, length)]
    with KernelBuilds(TrtllmBackend.jit_modules(spec, device), device) as builds:
        compiled = compile_all(own, compile_one, os.cpu_count() or 1, COMPILE_SECONDS)
        builds.wait()
    rate = read_rate()
    print(machine.describe("torch", "triton", "flashinfer-python"))
    print(f"{torch.cuda.get_device_name()}, reads and writes {rate / 1e12:.2f} TB/s; {args.shape}")
    results = Results()
    for point in map(Point, *zip(*product(args.query_lens, args.requests, args.lengths))):
        load = make_load(point, spec, args.context, device)
        floor_us = load.kv_bytes / rate * 1e6
        print(f"{point}; floor {floor_us:.1f} us", flush=True)
        calls = candidates_of(load, spec, point.query_len, compiled, args.native)
        if not measure(calls, point, floor_us, results, end):
            print(f"{args.seconds:.0f} s are over: the rest is not measured")
            break
    print(*results.rows(spec), sep="\n")


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--query-lens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, nargs="+", default=[64, 16, 128])
    parser.add_argument("--context", type=int, default=1152)
    parser.add_argument(
        "--lengths", nargs="+", choices=("even", "uneven"), default=["even", "uneven"]
    )
    parser.add_argument("--seconds", type=float, default=58.0, help="from the start of main on")
    parser.add_argument("--native", action="store_true", help="FA2 and FA3 too, which are compiled")
    args = parser.parse_args()
    args.lengths = [name == "even" for name in args.lengths]
    return args


def make_load(point: Point, spec: AttentionSpec, context: int, device: torch.device) -> Load:
    lengths = np.full(point.requests, context, np.int32)
    if not point.even:
        drawn = np.random.default_rng(0).uniform(np.log(128), np.log(4096), point.requests)
        lengths = np.exp(drawn).astype(np.int32)
    query_lens = np.full(point.requests, point.query_len, np.int32)
    return load_of(query_lens, lengths, device, spec)


def measure(
    calls: Iterator[tuple[str | SplitTile, Callable[[], Call]]],
    point: Point,
    floor_us: float,
    results: Results,
    end: float,
) -> bool:
    """Compare and time one after the other; says whether all of them were before the end."""
    due = None
    for name, make in calls:
        if time.monotonic() > end:
            return False
        try:
            call = make()
            rows = call(0)
            due = rows.clone() if due is None else due
            error = relative_error(rows, due)
            assert error < ALLOWED_ERROR, f"differs from the first by {error:.3g}"
            us = graph_us(call, LAYERS)
        except Exception as error:
            print(f"  {name} is out: {type(error).__name__}: {str(error)[:120]}", flush=True)
            torch.cuda.synchronize()
            continue
        print(f"  {us:7.1f} us  {us / floor_us:5.2f} x floor  {name}", flush=True)
        match name:
            case SplitTile():
                results.split[point][name] = us
            case "XQA":
                results.xqa[point] = us
    return True


def candidates_of(
    load: Load, spec: AttentionSpec, query_len: int, compiled: set[Job], native: bool
) -> Iterator[tuple[str | SplitTile, Callable[[], Call]]]:
    pools, out = [load.pool] + [load.pool.clone() for _ in range(LAYERS - 1)], load.q.clone()
    own = load, spec, pools, out
    yield "XQA", partial(by_trtllm, *own, decode=True)
    yield "FMHAv2", partial(by_trtllm, *own, decode=False)
    for name in ("fa2", "fa3") if native else ():
        yield f"flashinfer {name}", partial(by_flashinfer, *own, name)
    for tile in candidates(spec, query_len):
        if Job.of(spec, query_len, tile) in compiled:
            yield tile, partial(by_split, *own, tile)


def by_trtllm(
    load: Load, spec: AttentionSpec, pools: list[Tensor], out: Tensor, decode: bool
) -> Call:
    from dp_runtime.attention.trtllm.sm90 import make_calls

    calls, scales = make_calls(spec, load.q.device), KvScales()
    lengths = spec.decode_query_lens if decode else frozenset[int]()
    (group,) = build_groups(load.metadata, lengths)

    def call(layer: int) -> Tensor:
        (calls.decode if decode else calls.prefill)(load.q, pools[layer], scales, group, out)
        return out

    return call


def by_flashinfer(
    load: Load, spec: AttentionSpec, pools: list[Tensor], out: Tensor, backend: str
) -> Call:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    metadata, size = load.metadata, spec.page_size
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=load.q.device)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=backend)
    counts = -(-metadata.seq_lens_host // size)
    used = np.arange(metadata.page_table_host.shape[1]) < counts[:, None]
    last = (metadata.seq_lens_host - (counts - 1) * size).astype(np.int32)
    arrays = (offsets(counts.astype(np.int32)), metadata.page_table_host[used], last)
    wrapper.plan(
        metadata.cu_seqlens_q,
        *(torch.from_numpy(array).to(load.q.device) for array in arrays),
        spec.num_heads,
        spec.num_kv_heads,
        spec.head_dim,
        size,
        causal=True,
        q_data_type=spec.dtype,
        kv_data_type=spec.kv_dtype,
    )

    def call(layer: int) -> Tensor:
        wrapper.run(load.q, pools[layer], out=out)
        return out

    return call


def by_split(
    load: Load, spec: AttentionSpec, pools: list[Tensor], out: Tensor, tile: SplitTile
) -> Call:
    metadata, scale = load.metadata, spec.head_dim**-0.5

    def call(layer: int) -> Tensor:
        table, lengths = metadata.page_table, metadata.seq_lens
        split_attention(load.q, pools[layer], table, lengths, scale, out, tile)
        return out

    return call


if __name__ == "__main__":
    main()
