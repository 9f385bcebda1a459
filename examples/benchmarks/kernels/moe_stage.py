"""One layer's experts on one GPU: Triton kernels against grouped products, and the floor.

    python -m examples.benchmarks.kernels.moe_stage [--tokens 4 16 ...] [--shapes ep4 ...] [--fp8]

Qwen3-30B-A3B split over ranks, or a Qwen3.5 that is named, bf16 (--fp8: Triton's weights are e4m3
in blocks of 128 x 128), uniform random routing, four weight sets in turn, inside a CUDA graph,
routing included. Floor: the bytes of the active experts at the measured copy rate, or the
operations at the measured matrix rate in bf16, whichever is larger.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.layers.experts import Experts
from dp_runtime.layers.linear import Linear
from dp_runtime.layers.moe_kernels import MoeKernels, make_moe_kernels
from dp_runtime.layers.moe_router import Router
from dp_runtime.parallel.padding import PaddingMode, PaddingPlan
from dp_runtime.startup.memory_estimate import param_bytes
from dp_runtime.weights.fp8_blocks import BLOCK, ExpertScales, quantize
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import (
    describe_gpu,
    event_us,
    graph_us,
    matmul_rate,
    read_rate,
)


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a layer's experts; by default of Qwen3-30B-A3B."""

    num_local: int
    intermediate: int
    hidden: int = 2048
    num_experts: int = 128
    top_k: int = 8

    @property
    def has_whole_blocks(self) -> bool:
        return self.intermediate % BLOCK == 0  # e4m3 has a scale for each block


SHAPES = {
    "ep4": Shard(32, 768),
    "tp4": Shard(128, 192),
    "ep2": Shard(64, 768),
    "tp2": Shard(128, 384),
    "35b-ep1": Shard(256, 512, num_experts=256),
    "35b-tp2": Shard(256, 256, num_experts=256),
    "122b-ep2": Shard(128, 1024, 3072, 256),
    "122b-ep4": Shard(64, 1024, 3072, 256),
    "397b-ep4": Shard(128, 1024, 4096, 512, 10),
    "397b-ep8": Shard(64, 1024, 4096, 512, 10),
}
SETS = 4


@dataclass(frozen=True, eq=False)
class Stage:
    """Rows, and several layers' routers and experts of one shard."""

    rows: Tensor
    routers: list[Router]
    experts: list[Experts]  # in bf16
    stored: list[Experts]  # the same as Triton reads them

    @classmethod
    def make(cls, tokens: int, shard: Shard, fp8: bool) -> Stage:
        num_local, hidden = shard.num_local, shard.hidden

        def random(*shape: int) -> Tensor:
            return (torch.randn(shape, device="cuda") * 0.02).bfloat16()

        routers = [
            Router(Linear(random(shard.num_experts, hidden) * 50, None), shard.top_k, True)
            for _ in range(SETS)
        ]
        experts = [
            Experts(
                random(num_local, 2 * shard.intermediate, hidden),
                random(num_local, hidden, shard.intermediate),
                0,
            )
            for _ in range(SETS)
        ]
        rows = torch.randn(tokens, hidden, device="cuda").bfloat16()
        return cls(rows, routers, experts, [to_fp8(e) for e in experts] if fp8 else experts)

    def run(self, kernels: MoeKernels) -> Callable[[int], Tensor]:
        plan = PaddingPlan.for_mode(PaddingMode.RAGGED, (len(self.rows),))
        experts = self.stored if kernels.reads_fp8 else self.experts
        return lambda i: kernels.partial_sums(self.rows, plan, None, self.routers[i], experts[i])

    def floor_us(self, copy_rate: float, product_rate: float) -> float:
        """Of one call, averaged over the weight sets."""
        num_local, hidden, intermediate = self.experts[0].down.shape
        one = 3 * intermediate * hidden
        weight_bytes = param_bytes(self.stored[0]) / (num_local * one)
        total = 0.0
        for router in self.routers:
            local = router(self.rows)[1].flatten()
            local = local[local < num_local]
            read = len(local.unique()) * one * weight_bytes / copy_rate
            total += max(read, 2 * len(local) * one / product_rate)
        return total / SETS * 1e6


def to_fp8(experts: Experts) -> Experts:
    """The same experts in e4m3; a half of gate-up is a multiple of 128 rows."""
    gate_up = [quantize(matrix) for matrix in experts.gate_up]
    down = [quantize(matrix) for matrix in experts.down]
    scales = ExpertScales(*(torch.stack([s for _, s in pairs]) for pairs in (gate_up, down)))
    values = [torch.stack([v for v, _ in pairs]) for pairs in (gate_up, down)]
    return Experts(values[0], values[1], experts.first_expert, scales)


def main() -> None:
    parser = new_parser(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+",
                        default=[4, 16, 64, 128, 256, 512, 1024, 4096])  # fmt: skip
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["ep4", "tp4", "ep2"])
    parser.add_argument("--fp8", action="store_true", help="not with --shapes tp4")
    args = parser.parse_args()
    if args.fp8 and not all(SHAPES[shape].has_whole_blocks for shape in args.shapes):
        parser.error(f"--fp8 takes shapes of whole blocks of {BLOCK}: all but tp4")
    torch.manual_seed(0)
    print(machine.describe("torch", "triton"), describe_gpu(), sep="\n")
    rates = read_rate(), matmul_rate()
    names = ("floor us", "triton us", "x floor", "torch us", "speed-up")
    print(f"{'shard':<7}{'tokens':>7}" + "".join(f"{name:>11}" for name in names))
    for shape in args.shapes:
        for tokens in args.tokens:
            stage = Stage.make(tokens, SHAPES[shape], args.fp8)
            floor = stage.floor_us(*rates)
            triton = graph_us(stage.run(make_moe_kernels("triton")), SETS)
            torch_us = eager_us(stage.run(make_moe_kernels("torch")))
            figures = (floor, triton, triton / floor, torch_us, torch_us / triton)
            print(f"{shape:<7}{tokens:>7}" + "".join(f"{x:>11.2f}" for x in figures), flush=True)


def eager_us(run: Callable[[int], Tensor]) -> float:
    """The grouped products read sizes back to the host, so they can't be in a graph."""
    for i in range(SETS):
        run(i)
    return min(event_us(lambda: [run(i) for i in range(SETS)]) for _ in range(3)) / SETS


if __name__ == "__main__":
    main()
