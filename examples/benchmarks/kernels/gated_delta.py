"""Kernels of a gated delta net: decodes, verifications and prefill of one layer, and their floors.

    python -m examples.benchmarks.kernels.gated_delta                  # 64 v heads, as Qwen3.5-397B
    python -m examples.benchmarks.kernels.gated_delta --v-heads 32     # as Qwen3.5-35B

bf16 rows, float32 states of random requests, in a CUDA graph. Floor of decodes and verifications:
each state read and written once, at the measured rate of a copy. With fla-core installed its
chunk_gated_delta_rule runs beside run_chunks. Also the host's time for a layer of a prefill step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from dp_runtime.core.recurrent_metadata import Drafts, RecurrentMetadata
from dp_runtime.kernels.gated_delta.chunked import run_chunks
from dp_runtime.kernels.gated_delta.convolution import convolve
from dp_runtime.kernels.gated_delta.gated_norm import gated_rms_norm
from dp_runtime.kernels.gated_delta.recurrent import step_rows
from dp_runtime.kernels.gated_delta.rows import DeltaRows, HeadShape
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.device_timing import describe_gpu, graph_us, read_rate

BF16, EPS, WIDTH, HOST_CALLS = torch.bfloat16, 1e-6, 4, 50
CUDA = torch.device("cuda", 0)


@dataclass(frozen=True, eq=False)
class Layer:
    """Weights, states and one pass's rows of a layer, all random."""

    shape: HeadShape
    sequences: RecurrentMetadata
    qkv: Tensor
    ba: Tensor
    z: Tensor
    states: Tensor
    windows: Tensor
    draft_gates: Tensor | None

    @classmethod
    def make(cls, shape: HeadShape, lengths: list[int], max_drafts: int, fresh: bool) -> Layer:
        count, rows = len(lengths), sum(lengths)
        lens = np.array(lengths, np.int32)
        ends = torch.tensor([0, *lens.cumsum().tolist()], dtype=torch.int32, device=CUDA)
        slots = 1 + torch.randperm(count, device=CUDA)
        of_each = torch.full((count,), max_drafts, dtype=torch.int32, device=CUDA)
        drafts = Drafts(of_each, of_each // 2) if max_drafts else None
        is_fresh = torch.full((count,), fresh, device=CUDA)
        heads = (shape.num_v_heads, shape.head_k_dim, shape.head_v_dim)
        columns = WIDTH - 1 + max_drafts
        gates = torch.zeros(count + 1, max_drafts, 2, heads[0], device=CUDA)
        return cls(
            shape,
            RecurrentMetadata(ends, lens, slots, is_fresh, drafts),
            torch.randn(rows, shape.channels, device=CUDA).to(BF16),
            torch.randn(rows, 2 * heads[0], device=CUDA).to(BF16),
            torch.randn(rows, heads[0] * heads[2], device=CUDA).to(BF16),
            torch.zeros(count + 1, *heads, device=CUDA),
            torch.zeros(count + 1, columns, shape.channels, dtype=BF16, device=CUDA),
            gates if max_drafts else None,
        )

    def calls(self) -> dict[str, Callable[[int], object]]:
        """Every kernel's call, and that of all in turn."""
        shape, of = self.shape, self.sequences
        weight = torch.randn(WIDTH, shape.channels, device=CUDA).to(BF16)
        decay, bias = torch.full((2, shape.num_v_heads), -0.1, device=CUDA)
        gain = torch.ones(shape.head_v_dim, device=CUDA)
        heads = (len(self.qkv), shape.num_v_heads, shape.head_v_dim)
        out = torch.zeros(heads, dtype=BF16, device=CUDA)

        def conv(_: int = 0) -> DeltaRows:
            vectors = decay, bias
            return convolve(self.qkv, self.ba, weight, *vectors, self.windows, self.draft_gates, of)

        def mix(rows: DeltaRows) -> None:
            step_rows(rows, shape, self.states, out, of, EPS)
            run_chunks(rows, shape, self.states, out, of, EPS)

        def norm(_: int = 0) -> Tensor:
            return gated_rms_norm(out, self.z, gain, EPS)

        def everything(_: int) -> None:
            mix(conv())
            norm()

        rows = conv()
        return {
            "convolution": conv,
            "delta rule": lambda _: mix(rows),
            "gated norm": norm,
            "all": everything,
        }


def main() -> None:
    args = parse_args()
    print(machine.describe("torch", "triton"), ";", describe_gpu())
    shape, rate = HeadShape(args.k_heads, args.v_heads, 128, 128), read_rate()
    state_bytes = shape.num_v_heads * 128 * 128 * 4
    for requests in (8, 32, 128):
        floor = 2 * requests * state_bytes / rate * 1e6
        for drafts in (0, 3):
            count = max(2, min(8, 256 // requests))  # data sets: the L2 holds none of them
            lengths = [1 + drafts] * requests
            layers = [Layer.make(shape, lengths, drafts, fresh=False) for _ in range(count)]
            report(f"{requests} requests, {drafts} drafts", layers, floor)
    for lengths in ([8192], [1024] * 8, [100] * 80):
        layer = Layer.make(shape, lengths, 0, fresh=True)
        report(f"{len(lengths)} prompts of {lengths[0]} rows", [layer], None)
        print(f"  host, all: {host_us(layer.calls()['all']):.0f} us")
        if find_spec("fla") is not None:
            print(f"  fla's chunk_gated_delta_rule: {graph_us(fla_call(layer), 1):.1f} us")


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--k-heads", type=int, default=16)
    parser.add_argument("--v-heads", type=int, default=64)
    return parser.parse_args()


def report(what: str, layers: list[Layer], floor_us: float | None) -> None:
    print(what if floor_us is None else f"{what}; floor {floor_us:.1f} us")
    of_each = [layer.calls() for layer in layers]
    for name in of_each[0]:
        took = graph_us(partial(call_one, [calls[name] for calls in of_each]), len(layers))
        ratio = "" if floor_us is None else f" ({took / floor_us:.2f}x)"
        print(f"  {name}: {took:.1f} us{ratio}")


def call_one(calls: Sequence[Callable[[int], object]], index: int) -> None:
    calls[index](0)


def host_us(call: Callable[[int], object]) -> float:
    """Microseconds until a call returns; the device, which waits for nobody, goes on."""
    call(0)
    torch.cuda.synchronize()
    begin = perf_counter()
    for _ in range(HOST_CALLS):
        call(0)
    took = perf_counter() - begin
    torch.cuda.synchronize()
    return took / HOST_CALLS * 1e6


def fla_call(layer: Layer) -> Callable[[int], object]:
    """The same sizes and states; it tunes itself before it is timed."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    shape, of = layer.shape, layer.sequences
    k_size = shape.num_k_heads * shape.head_k_dim
    parts = layer.qkv.tensor_split([k_size, 2 * k_size], 1)
    q, k, v = (x.unflatten(1, (-1, 128)).contiguous()[None] for x in parts)
    g, beta = -torch.rand_like(layer.ba[:, ::2]).float()[None], layer.ba[:, 1::2].sigmoid()[None]
    state = layer.states[of.slots]
    ends = of.cu_seqlens.long()
    ends_host = ends.cpu()

    def call(_: int) -> object:
        return chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, output_final_state=True,
            use_qk_l2norm_in_kernel=True, cu_seqlens=ends, cu_seqlens_cpu=ends_host,
        )  # fmt: skip

    call(0)
    return call


if __name__ == "__main__":
    main()
