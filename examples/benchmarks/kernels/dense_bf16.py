"""Products of a decode step's few rows with bf16 matrices: cuBLAS, and our own kernel's tiles.

    python -m examples.benchmarks.kernels.dense_bf16 [--models 30b ...] [--rows 1 64 ...]

Matrices of the mixers of Qwen3-30B-A3B, Qwen3.5-35B-A3B and 397B-A17B, as a step finds them
(harness/cold_timing.py): read from memory, after a kernel that writes the rows. Tiles are compiled
beforehand in processes, and each is compared with cuBLAS. The floor is the bytes of weights at the
measured copy rate. For each matrix and number of rows: cuBLAS, and the best tiles. At the end of a
matrix: the tiles that are best, as rows of the table by which the runtime chooses
(dp_runtime/kernels/dense_linear/measured.py); at the end, for each number of rows, those that are
best over all matrices. What fails is named and left out; it ends after --seconds, with what it has
found.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.kernels.dense_linear.run import multiply
from dp_runtime.kernels.dense_linear.tiles import DenseTile
from dp_runtime.kernels.fp8_linear.tiles import NUM_COUNTERS
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.cold_timing import CALLS, Call, ColdTimer
from examples.benchmarks.harness.device_timing import read_rate
from examples.benchmarks.kernels.parallel_builds import compile_all
from examples.benchmarks.kernels.trials import (
    ALLOWED_ERROR,
    SHARED_MEMORY,
    relative_error,
    summarize,
)

ROWS = (16, 64, 32, 128, 8, 1)
MODELS = {  # outputs and inputs; another model's output has those of one that is here
    "30b": {"qkv": (5120, 2048), "out": (2048, 4096)},
    "35b": {"qkv+gate": (9216, 2048), "delta in": (12352, 2048)},
    "397b": {"qkv+gate": (17408, 4096), "delta in": (20608, 4096), "out": (4096, 8192)},
}
KINDS = {  # by block_m: block_n, block_k, warps, stages
    16: ((64, 128, 4, 4), (64, 128, 4, 6), (128, 128, 8, 4), (32, 128, 4, 6)),
    32: ((64, 128, 4, 4), (64, 128, 4, 6), (128, 128, 8, 4), (32, 128, 4, 6)),
    64: ((64, 128, 4, 3), (64, 128, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)),
    128: ((64, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)),
}
LEAST, MOST = 120, 340  # programs
CUBLAS = "cuBLAS"
BEST = 3  # that are printed
Job = tuple[DenseTile, int]
Times = dict[str | DenseTile, float]


def candidates(rows: int, outputs: int, inputs: int) -> Iterator[DenseTile]:
    """Tiles with enough programs, whose sums are no more bytes than the matrix."""
    block_m = block_m_of(rows)
    for n, k, warps, stages in KINDS[block_m]:
        for split in (1, 2, 4, 8, 16):
            tile = DenseTile(block_m, n, k, split, warps, stages)
            tiles = tile.num_tiles(rows, outputs)
            fair = LEAST <= tiles * split <= MOST or (split == 1 and tiles > MOST)
            moved = 8 * tile.num_sums(rows, outputs)
            if fair and moved <= 2 * outputs * inputs and fits(tile, inputs):
                yield tile


def block_m_of(rows: int) -> int:
    return min(128, max(16, 1 << (rows - 1).bit_length()))


def fits(tile: DenseTile, inputs: int) -> bool:
    """Say if each part has inputs, and a program's shared memory suffices."""
    shared = 2 * tile.num_stages * tile.block_k * (tile.block_m + tile.block_n)
    return (tile.split - 1) * tile.share(inputs) < inputs and shared < SHARED_MEMORY - 1024


def compile_one(job: Job) -> None:
    """Run a kernel over a small matrix, which compiles it into Triton's cache."""
    tile, inputs = job
    weight = torch.zeros(256, inputs, dtype=torch.bfloat16, device="cuda")
    out = weight.new_empty(2, 256)
    multiply(weight[:2], weight, out, new_counters(), tile)
    torch.cuda.synchronize()


def new_counters() -> Tensor:
    return torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda")


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=55.0, help="from the start of main on")
    parser.add_argument("--workers", type=int, default=min(24, os.cpu_count() or 1))
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    print(machine.describe("torch", "triton"), torch.cuda.get_device_name(), sep="\n", flush=True)
    shapes = {f"{m} {part}": size for m in args.models for part, size in MODELS[m].items()}
    points = [(rows, *size) for size in shapes.values() for rows in args.rows]
    jobs = [tile.kind(point[2]) for point in points for tile in candidates(*point)]
    compiled = compile_all(jobs, compile_one, args.workers, 0.5 * args.seconds)
    timer, rate = ColdTimer.on(torch.device("cuda", 0)), read_rate()
    print(f"reads and writes {rate / 1e12:.2f} TB/s")
    found: dict[int, dict[str, dict[DenseTile, float]]] = defaultdict(dict)
    for name, (outputs, inputs) in shapes.items():
        weights = torch.empty(CALLS, outputs, inputs, dtype=torch.bfloat16, device="cuda")
        weights.normal_(std=0.02)
        of_matrix = dict[int, Times]()
        for rows in args.rows:
            if time.monotonic() > deadline:
                print(f"{args.seconds:.0f} s are over: {name} with {rows} rows is left out")
                continue
            of_matrix[rows] = measure(name, weights.unbind(), rows, compiled, timer, rate)
        print(*table(outputs, inputs, of_matrix), sep="\n", flush=True)
        for rows, times in of_matrix.items():
            found[rows][name] = tiles_of(times)
        del weights
    for rows, by_name in found.items():
        summarize(rows, {name: times for name, times in by_name.items() if times})


def measure(
    name: str,
    weights: tuple[Tensor, ...],
    rows: int,
    compiled: set[Job],
    timer: ColdTimer,
    rate: float,
) -> Times:
    """Time cuBLAS and all tiles together, in microseconds."""
    outputs, inputs = weights[0].shape
    x = torch.randn(rows, inputs, device="cuda").bfloat16()
    times = timer.times(calls(x, weights, compiled), x)
    cublas, floor = times.get(CUBLAS, float("nan")), weights[0].nbytes / rate * 1e6
    print(f"{name} {outputs} x {inputs}, {rows} rows: floor {floor:.1f} us, cuBLAS {cublas:.1f}")
    for tile, us in list(tiles_of(times).items())[:BEST]:
        print(f"  {us:6.1f} us {us / floor:5.2f} x floor {us / cublas:5.2f} x cuBLAS  {tile}")
    print(end="", flush=True)
    return times


def tiles_of(times: Times) -> dict[DenseTile, float]:
    """Leave cuBLAS out; the fastest first."""
    own = {tile: us for tile, us in times.items() if isinstance(tile, DenseTile)}
    return dict(sorted(own.items(), key=lambda item: item[1]))


def table(outputs: int, inputs: int, by_rows: dict[int, Times]) -> Iterator[str]:
    """For each block_m the tile with the least times beside the best of each number of rows."""
    groups: dict[int, dict[int, Times]] = defaultdict(dict)
    for rows, times in sorted(by_rows.items()):
        if CUBLAS in times and len(times) > 1:
            groups[block_m_of(rows)][rows] = times
    for group in groups.values():
        alike = [dict.fromkeys(tiles_of(times)) for times in group.values()]
        tiles = [tile for tile in alike[0] if all(tile in other for other in alike)]
        if not tiles:
            continue
        tile = min(tiles, key=lambda t: prod(x[t] / min(x.values()) for x in group.values()))
        rows_of = (f"({n}, {x[CUBLAS]:.1f}, {x[tile]:.1f})" for n, x in group.items())
        yield f"MeasuredProduct({outputs}, {inputs}, {tile}, ({', '.join(rows_of)},)),"


def calls(
    x: Tensor, weights: tuple[Tensor, ...], compiled: set[Job]
) -> Iterator[tuple[str | DenseTile, Callable[[], Call]]]:
    due, outputs, counters = F.linear(x, weights[0]), len(weights[0]), new_counters()

    def compared(tile: DenseTile) -> Call:
        def call(i: int) -> Tensor:
            return multiply(x, weights[i], x.new_empty(len(x), outputs), counters, tile)

        first, second = call(0), call(0)
        error = relative_error(first, due)
        assert error < ALLOWED_ERROR, f"differs from cuBLAS by {error:.3g}"
        assert torch.equal(first, second), "another run has other bits"
        return call

    yield CUBLAS, lambda: lambda i: F.linear(x, weights[i])
    for tile in candidates(len(x), *weights[0].shape):
        if tile.kind(x.shape[1]) in compiled:
            yield tile, partial(compared, tile)


if __name__ == "__main__":
    main()
