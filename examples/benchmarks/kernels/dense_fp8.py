"""Products with e4m3 matrices that stay so, on one GPU: cuBLAS in bf16, the floor, and tiles.

    python -m examples.benchmarks.kernels.dense_fp8 [--models 397b ...] [--rows 1 64 ...]

The matrices of attention, delta nets and shared experts of Qwen3.5 (35B, 122B, 397B) and
Qwen3-30B-A3B. Candidates are compiled beforehand in processes, checked against the widened matrix,
and timed in CUDA graphs over so many matrices in turn that the L2 does not hold them. The floor is
the bytes of weights, scales and rows at the measured copy rate, or the operations at the measured
matrix rate in bf16, whichever is larger. For each matrix and number of rows: cuBLAS in bf16, a
widened copy and cuBLAS, the tile in use, and the best; then, for each number of rows, the tiles
that are best over all matrices, with their distance from the best of each. What fails is named and
skipped; it ends after --seconds, with what it has found.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.fp8_linear.run import multiply, widened
from dp_runtime.kernels.fp8_linear.tiles import (
    NUM_COUNTERS,
    LinearTile,
    choose_tile,
    interleave,
    whole_split,
)
from dp_runtime.weights.fp8_blocks import BLOCK, quantize
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import describe_gpu, graph_us, matmul_rate, read_rate
from examples.benchmarks.kernels.parallel_builds import compile_all
from examples.benchmarks.kernels.trials import relative_error, summarize, try_all

ROWS = (1, 8, 32, 64, 128, 512, 2048)
MODELS = {  # outputs and inputs that are e4m3: in, out of mixers; gate-up, down of shared experts
    "35b": {"qkv+gate": (9216, 2048), "delta in": (12288, 2048), "out": (2048, 4096),
            "shared up": (1024, 2048), "shared down": (2048, 512)},
    "122b": {"qkv+gate": (17408, 3072), "delta in": (20480, 3072), "out": (3072, 8192),
             "shared up": (2048, 3072), "shared down": (3072, 1024)},
    "397b": {"qkv+gate": (17408, 4096), "delta in": (20480, 4096), "out": (4096, 8192),
             "shared up": (2048, 4096), "shared down": (4096, 1024)},
    "30b": {"qkv": (5120, 2048)},  # its output's is that of 35b
}  # fmt: skip
KINDS = {  # by block_m: block_n, block_k, warps, stages
    16: ((64, 128, 4, 4), (64, 128, 4, 7), (64, 64, 4, 8), (128, 128, 4, 4), (128, 128, 8, 5)),
    32: ((64, 128, 4, 4), (64, 128, 4, 6), (64, 64, 4, 8), (128, 128, 8, 4), (128, 128, 8, 5)),
    64: ((64, 128, 4, 3), (64, 128, 4, 5), (128, 128, 8, 3), (128, 128, 8, 4), (128, 64, 8, 5)),
    128: ((64, 128, 4, 3), (128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 8, 4)),
}
COLD_BYTES = 100 << 20  # of different matrices, beyond what the L2 holds
MULTIPROCESSORS = 132


def candidates(rows: int, outputs: int, inputs: int) -> Iterator[LinearTile]:
    """Tiles with enough programs for most multiprocessors, and not many times as many."""
    least = min(128, max(16, 1 << (rows - 1).bit_length()))
    for block_m in {least, max(16, least // 2)} if least > 16 else {16}:
        for block_n, block_k, warps, stages in KINDS[block_m]:
            tiles = -(-rows // block_m) * -(-outputs // block_n)
            splits = {whole_split(inputs, split) for split in (1, 2, 3, 4, 6, 8, 16)}
            fair = {s for s in splits if s == 1 or (tiles * s <= 6 * MULTIPROCESSORS)}
            enough = {s for s in fair if tiles * s >= MULTIPROCESSORS // 2} or {max(fair)}
            for split in sorted(enough)[:4]:
                for tma in (False, True):
                    yield LinearTile(block_m, block_n, block_k, split, warps, stages, True, tma)


def compiled_as(tile: LinearTile) -> LinearTile:
    return replace(tile, split=min(tile.split, 2))


def compile_one(tile: LinearTile) -> None:
    """Run a kernel over a small matrix, which compiles it into Triton's cache."""
    device = torch.device("cuda")
    x = torch.zeros(2, 256, dtype=torch.bfloat16, device=device)
    weight, scales = x.new_zeros(256, 256, dtype=E4M3), x.new_zeros(2, 256, dtype=torch.float32)
    counters = x.new_zeros(NUM_COUNTERS, dtype=torch.int32)
    multiply(x, weight, scales, torch.empty_like(x), counters, tile)
    torch.cuda.synchronize()


@dataclass(frozen=True, eq=False)
class Matrices:
    """Copies of one matrix in e4m3 with scales by output, and widened to bf16."""

    values: list[Tensor]
    scales: list[Tensor]
    wide: list[Tensor]
    counters: Tensor

    @classmethod
    def draw(cls, outputs: int, inputs: int) -> Matrices:
        weight = torch.randn(outputs, inputs, device="cuda") * 0.02
        values, scales = quantize(weight)
        by_output = scales.repeat_interleave(BLOCK, 0)[:outputs].t().contiguous()
        values = interleave(values.contiguous())
        wide, count = widened(values, by_output, torch.bfloat16), 1 + COLD_BYTES // values.nbytes
        return cls(
            [values.clone() for _ in range(count)],
            [by_output.clone() for _ in range(count)],
            [wide.clone() for _ in range(1 + count // 2)],
            torch.zeros(NUM_COUNTERS, dtype=torch.int32, device="cuda"),
        )

    def multiply(self, i: int, x: Tensor, tile: LinearTile | None) -> Tensor:
        if tile is None:
            return F.linear(x, widened(self.values[i], self.scales[i], x.dtype))
        out = x.new_empty(len(x), len(self.values[i]))
        return multiply(x, self.values[i], self.scales[i], out, self.counters, tile)

    def us(self, x: Tensor, tile: LinearTile | None) -> float:
        return graph_us(lambda i: self.multiply(i, x, tile), len(self.values), 3)

    def cublas_us(self, x: Tensor) -> float:
        return graph_us(lambda i: F.linear(x, self.wide[i]), len(self.wide), 3)


def say(text: str) -> None:
    print(text, flush=True)


def times_of(
    matrices: Matrices, x: Tensor, compiled: set[LinearTile], deadline: float
) -> dict[LinearTile, float]:
    due = F.linear(x, matrices.wide[0])
    outputs, inputs = matrices.values[0].shape
    tiles = [t for t in candidates(len(x), outputs, inputs) if compiled_as(t) in compiled]
    return try_all(
        tiles,
        lambda tile: relative_error(matrices.multiply(0, x, tile), due),
        lambda tile: matrices.us(x, tile),
        deadline,
    )


def measure(
    name: str, matrices: Matrices, rows: int, compiled: set[LinearTile], deadline: float,
    rates: tuple[float, float],
) -> dict[LinearTile, float]:  # fmt: skip
    outputs, inputs = matrices.values[0].shape
    x = torch.randn(rows, inputs, device="cuda").bfloat16()
    moved = matrices.values[0].nbytes + matrices.scales[0].nbytes + 2 * rows * (inputs + outputs)
    floor = max(moved / rates[0], 2.0 * rows * outputs * inputs / rates[1]) * 1e6
    cublas, copied = matrices.cublas_us(x), matrices.us(x, None)
    in_use = choose_tile(rows, outputs, inputs)
    found = times_of(matrices, x, compiled, deadline)
    if in_use is None:
        used = f"{copied:.1f}"
    else:
        ok = in_use in found or compiled_as(in_use) in compiled
        used = f"{matrices.us(x, in_use):.1f}" if ok else "not compiled"
    say(
        f"{name:<18}{outputs:>6} x{inputs:>5} {rows:>5} rows: floor {floor:6.1f} us, bf16 cuBLAS "
        f"{cublas:6.1f}, widened copy {copied:6.1f}, in use {used}"
    )
    for tile, us in list(found.items())[:2]:
        say(f"  {us:6.1f} us {us / floor:5.2f} x floor {cublas / us:5.2f} x cuBLAS's rate  {tile}")
    return found


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--workers", type=int, default=min(24, os.cpu_count() or 1))
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    torch.manual_seed(0)
    say(machine.describe("torch", "triton") + "\n" + describe_gpu())
    shapes = {f"{m} {part}": size for m in args.models for part, size in MODELS[m].items()}
    jobs = [
        compiled_as(tile)
        for size in shapes.values()
        for rows in args.rows
        for tile in (choose_tile(rows, *size), *candidates(rows, *size))
        if tile is not None
    ]
    compiled = compile_all(jobs, compile_one, args.workers, args.seconds / 3)
    rates, points = (read_rate(), matmul_rate()), len(shapes) * len(args.rows)
    found: dict[int, dict[str, dict[LinearTile, float]]] = defaultdict(dict)
    for name, size in shapes.items():
        matrices = Matrices.draw(*size)
        for rows in args.rows:
            now = time.monotonic()
            until = now + (deadline - now) / points
            times = measure(name, matrices, rows, compiled, until, rates)
            if times:
                found[rows][name] = times
            points -= 1
        del matrices
        torch.cuda.empty_cache()
    for rows, by_name in found.items():
        summarize(rows, by_name)


if __name__ == "__main__":
    main()
