"""Small calls of kernels, for a memory checker: all, or those of the groups named.

    compute-sanitizer --tool memcheck --error-exitcode 9 python -m tests.gpu.sanitize [GROUP ...]

Groups are recurrent, experts, dense, gates, trtllm and flashinfer; these append keys and values.
Each tensor has memory of its own, so that reading behind it is seen. Exit status 1 if a result is
not finite; what is padded is NaN.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.core.request import RoutingShape
from dp_runtime.kernels.expert_tiles import ExpertTiles, choose_tiles
from dp_runtime.kernels.experts import run_experts
from dp_runtime.kernels.fp8_linear.run import multiply
from dp_runtime.kernels.fp8_linear.tiles import LinearTile
from dp_runtime.kernels.gated_delta.rows import HeadShape
from dp_runtime.kernels.gates import add_gated, multiply_gate
from dp_runtime.kernels.moe_router import route
from dp_runtime.layers.linear import Fp8Linear, load_projection
from dp_runtime.layers.routing_buffer import RoutingBuffer
from dp_runtime.weights.dummy import DummyWeights
from dp_runtime.weights.fp8_blocks import ExpertScales, quantize
from dp_runtime.weights.fp8_names import Fp8Names
from tests.dp_runtime.kernels.gated_delta.oracle import Caches, Net, Rows, run, sequences_of
from tests.gpu.build import build_all
from tests.gpu.cases import CUDA, Case, Lengths

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
SPECS = {
    "bf16": AttentionSpec(32, 4, 128, 64, BF16, BF16, frozenset({1, 4})),
    "e4m3": AttentionSpec(32, 4, 128, 64, BF16, E4M3, frozenset({1, 4})),
}
CALLS: dict[str, Lengths] = {
    "prefill": [(70, 70), (33, 100), (1, 1), (64, 64)],
    "decode": [(1, 1), (1, 64), (1, 65), (1, 300)],
    "verify": [(4, 4), (4, 67), (4, 300)],
}
NONE = (0, 0, 0, 0)
DELTA_CALLS = {  # rows of each sequence, drafts of each, and those accepted of the pass before
    "prompts": ((70, 1, 129, 8), NONE, NONE),
    "verifications": ((4, 4, 4, 4), (3, 3, 3, 0), NONE),
    "decodes": ((1, 1, 1, 1), NONE, (3, 0, 2, 0)),
    "a mixture": ((4, 65, 1, 4), (3, 0, 0, 0), NONE),
    "decodes after it": ((1, 1, 1, 1), NONE, (2, 0, 0, 0)),
}
EXPERTS, TOP_K, FIRST, LOCAL = 20, 4, 3, 7
EXPERT_SIZES = {False: (264, 72), True: (384, 256)}  # hidden, intermediate; if e4m3
PAIRS = (2, 22, 48, 90, 200)  # of an expert, by which tiles are chosen


def failures(what: str, *results: Tensor) -> int:
    torch.cuda.synchronize()
    finite = all(bool(result.isfinite().all()) for result in results)
    print(f"{what}: {'finite' if finite else 'NOT FINITE'}", flush=True)
    return not finite


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=CUDA) * scale).to(BF16)


def check_delta_nets() -> int:
    """Run passes of three requests and a null sequence, one after the other."""
    failed = 0
    for shape in (HeadShape(16, 64, 128, 128), HeadShape(2, 4, 16, 24)):
        net = Net.draw(shape, 4, BF16)
        caches, slots = Caches.dirty(net, 4, 3), [3, 1, 2, 0]
        for kind, (lengths, *drafts) in DELTA_CALLS.items():
            of = sequences_of(lengths, slots, [kind == "prompts"] * 4, (drafts[0], drafts[1]))
            out = run(net, Rows.draw(shape, sum(lengths), BF16), caches, of)
            what = f"gated delta net, {shape.num_v_heads} heads, {kind}"
            failed += failures(what, out, caches.states[1:])
            failed += not bool(caches.states[0].isnan().all())
    return failed


def expert_weights(outputs: int, inputs: int, fp8: bool) -> tuple[Tensor, Tensor | None]:
    wide = draw(LOCAL, outputs, inputs, scale=inputs**-0.5)
    if not fp8:
        return wide, None
    values, scales = zip(*map(quantize, wide))
    return torch.stack(values), torch.stack(scales)


def tilings(inner: int, fp8: bool) -> Iterator[ExpertTiles]:
    rows = (pairs * EXPERTS // TOP_K for pairs in PAIRS)
    yield from dict.fromkeys(choose_tiles(n, TOP_K, EXPERTS, inner, fp8) for n in rows)


def check_experts() -> int:
    """Route rows of two ranks with padding between, and run them by all kinds of tiles."""
    failed = 0
    for fp8, (hidden, inner) in EXPERT_SIZES.items():
        router = draw(EXPERTS, hidden, scale=0.2)
        gate_up, of_gate_up = expert_weights(2 * inner, hidden, fp8)
        down, of_down = expert_weights(hidden, inner, fp8)
        pair = of_gate_up, of_down
        scales = None if pair[0] is None or pair[1] is None else ExpertScales(pair[0], pair[1])
        for rows in (2, 70, 600):
            first, second = rows // 2, rows // 3
            ranges = torch.tensor([[0, first], [first, second]], dtype=torch.int32, device=CUDA)
            x = draw(rows, hidden)
            x[first + second :] = float("nan")
            kept = RoutingBuffer(RoutingShape(2, TOP_K, EXPERTS), first, 0, CUDA).layer(1)
            routing = route(x, router, ranges, TOP_K, True, FIRST, LOCAL, kept)
            for tiles in tilings(inner, fp8):
                out = run_experts(x, gate_up, down, routing, tiles, scales)
                what = f"experts, e4m3 {fp8}, {rows} rows, {tiles.gate_up}"
                failed += failures(what, out, routing.weights)
    return failed


def check_dense() -> int:
    """Multiply few rows and many by e4m3 matrices whose tails are all kinds."""
    failed, names = 0, Fp8Names(exempt=("rest",))
    for outputs, rest, inputs in ((1000, 24, 400), (192, 0, 48)):
        source = DummyWeights(0, CUDA, BF16, fp8=names)
        parts = {"model.a": outputs, **({"model.rest": rest} if rest else {})}
        linear = load_projection(source, parts, inputs)
        assert isinstance(linear, Fp8Linear)
        for rows in (1, 20, 100, 130):  # of the last, by a widened copy
            what = f"e4m3 matrix of {outputs} x {inputs}, {rows} rows"
            failed += failures(what, linear(draw(rows, inputs)))
        tile, x = LinearTile(128, 64, 128, 1, 4, 3, tma=True), draw(130, inputs)
        out = x.new_empty(130, outputs)
        multiply(x, linear.weight, linear.scales, out, linear.counters, tile)
        failed += failures(f"e4m3 matrix of {outputs} x {inputs}, {tile}", out)
    return failed


def check_gates() -> int:
    failed = 0
    for size in (24, 1064):
        both = draw(5, 2 * size)
        x, gate = both[:, :size], both[:, size:]
        results = [multiply_gate(x, gate, silu) for silu in (False, True)]
        out, routed, row = draw(5, size), draw(5, size), draw(5, size)
        failed += failures(f"gates, {size}", *results, add_gated(out, routed, row, draw(1, size)))
    return failed


def check_attention(name: str) -> int:
    build_all([(name, spec) for spec in SPECS.values()], CUDA)
    failed = 0
    for spec in SPECS.values():
        for kind, lengths in CALLS.items():
            out = Case.make(lengths, spec).run(name)
            failed += failures(f"{name}, {spec.dtypes}, {kind}", out)
    return failed


GROUPS: dict[str, Callable[[], int]] = {
    "recurrent": check_delta_nets,
    "experts": check_experts,
    "dense": check_dense,
    "gates": check_gates,
    "trtllm": partial(check_attention, "trtllm"),
    "flashinfer": partial(check_attention, "flashinfer"),
}


def main() -> int:
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read at the first allocation
    torch.manual_seed(0)
    return 1 if sum(GROUPS[name]() for name in sys.argv[1:] or GROUPS) else 0


if __name__ == "__main__":
    sys.exit(main())
