"""What the attention contract costs a step of the Qwen3-30B-A3B shape, on the host.

    python -m examples.benchmarks.contract_cost
    python -m examples.benchmarks.contract_cost --no-step    # without the model, as on a CPU

Values, and what the plan of a pass holds, are checked once a pass; the checks of the 48 layers are
recorded from their own calls and replayed, without the rest of their work. Times are medians.
With a GPU it also times the shape's eager decode steps, with dummy weights, on --dp-size ranks.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from dp_runtime import Engine, EngineConfig, SamplingParams
from dp_runtime.attention.backend import AttentionBackend
from dp_runtime.attention.contract import compare, metadata_comparisons
from dp_runtime.attention.plan import AttentionPlan
from dp_runtime.attention.spec import AttentionSpec
from dp_runtime.attention.trtllm.backend import TrtllmBackend
from dp_runtime.attention.trtllm.kernel_plan import KernelPlan
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place, check_values
from dp_runtime.core.batch import LocalBatch
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.nvl4.shape import QWEN3_30B_A3B, write_shape
from examples.paged_batch import paged_batch

GOAL_US, GOAL_SHARE = 20.0, 0.01
LAYERS = int(QWEN3_30B_A3B["num_hidden_layers"])
HEADS, KV_HEADS = int(QWEN3_30B_A3B["num_attention_heads"]), 4
HEAD_DIM, PAGE, CONTEXT = int(QWEN3_30B_A3B["head_dim"]), 64, 1024
PLACE = Place(0, 0, "target")
Tensors = tuple[torch.Tensor, AttentionMetadata]  # q
DECODES = (1, 16, 64, 128, 256)
MIXED = (63, 1985)  # decoding requests, and the rows of one prefill chunk


@dataclass(frozen=True)
class Cost:
    """Microseconds of a step's checks."""

    values_us: float
    layers_us: float  # all of them
    num_checks: int

    @property
    def total_us(self) -> float:
        return self.values_us + self.layers_us


def make_batch(decodes: int, chunk: int) -> LocalBatch:
    """Requests of CONTEXT tokens that decode one, and perhaps a prefill chunk behind them."""
    query_lens = np.array([1] * decodes + [chunk] * (chunk > 0), np.int32)
    seq_lens = np.array([CONTEXT] * decodes + [chunk] * (chunk > 0), np.int32)
    width = -(-int(seq_lens.max()) // PAGE)
    page_table = np.tile(np.arange(1, width + 1, dtype=np.int32), (len(query_lens), 1))
    return paged_batch(query_lens, seq_lens, page_table, PAGE)


class NoKernels:
    """Stands where a GPU's kernels are: the host's part of a call is all that runs."""

    def prefill(self, *call: object) -> None: ...

    def decode(self, *call: object) -> None: ...


@dataclass(frozen=True)
class Call:
    """One check that an attention call made."""

    check: Callable[..., object]
    arguments: tuple[object, ...]


def recorded_checks(backend: AttentionBackend, tensors: Tensors) -> list[Call]:
    """Every check that the layers make in a pass, in their order: of q and of kernel calls."""
    calls: list[Call] = []

    def recording(check: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(Call(check, arguments))
            return check(*arguments)

        return call

    q, metadata = tensors
    plan = backend.plan(metadata)
    with ExitStack() as patches:
        for owner, name in ((AttentionPlan, "check_rows"), (KernelPlan, "check_call")):
            patches.enter_context(patch.object(owner, name, recording(getattr(owner, name))))
        for layer in range(LAYERS):
            backend.layer(layer).run(q, plan)
    return calls


def measure(decodes: int, chunk: int, repeats: int, device: torch.device) -> Cost:
    """Median cost of one pass's checks: the backend's own, replayed without its other work."""
    dtype = torch.bfloat16
    spec = AttentionSpec(HEADS, KV_HEADS, HEAD_DIM, PAGE, dtype, dtype)
    batch = make_batch(decodes, chunk)
    pages = PageGeometry(int(batch.page_table.max()) + 1, PAGE)
    pool = torch.zeros((pages.num_pages, 2, KV_HEADS, PAGE, HEAD_DIM), dtype=dtype, device=device)
    backend = TrtllmBackend(spec, [pool] * LAYERS, calls=NoKernels())
    q = torch.zeros((batch.num_tokens, HEADS, HEAD_DIM), dtype=dtype, device=device)
    metadata = AttentionMetadata.build(batch, pages, PLACE, device)
    calls = recorded_checks(backend, (q, metadata))
    plan, where = backend.plan(metadata), str(PLACE)
    values, checks = [], []
    for _ in range(repeats):
        start = perf_counter()
        check_values(batch, pages, PLACE)
        values.append(perf_counter() - start)
        start = perf_counter()
        compare(metadata_comparisons(metadata, spec, device), where)
        compare(plan.comparisons(device), where)
        for call in calls:
            call.check(*call.arguments)
        checks.append(perf_counter() - start)
    return Cost(median(values) * 1e6, median(checks) * 1e6, len(calls))


def step_seconds(dp_size: int, num_tokens: int) -> dict[int, float]:
    """Median seconds of an eager decode step by requests a rank, from a rank's step traces."""
    with TemporaryDirectory() as directory:
        config = EngineConfig(
            str(write_shape(Path(directory))), dp_size=dp_size, launcher="local", device="cuda",
            load_format="dummy", max_num_requests=max(DECODES), max_num_tokens=8192,
            max_model_len=2048, start_timeout_s=900.0,
        )  # fmt: skip
        with Engine(config, show_progress=True) as engine:
            return {count: _decode_step(engine, count, num_tokens) for count in DECODES}


def _decode_step(engine: Engine, count: int, num_tokens: int) -> float:
    dp_size = engine.config.dp_size
    prompts = [[1 + index] * 64 for index in range(count * dp_size)]
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    known = len(engine.step_trace())
    engine.generate(prompts, params, [index % dp_size for index in range(len(prompts))])
    steps = engine.step_trace()[known:]
    full = [s for s in steps if s.dp_rank == 0 and s.passes[0].real_rows == (count,) * dp_size]
    return median(step.busy_s + step.wait_s for step in full)


def main() -> None:
    options = _options()
    cuda = torch.cuda.is_available()
    print(machine.describe("torch"), "; GPU" if cuda else "; no GPU")
    gc.freeze()
    device = torch.device("cuda" if cuda else "cpu")
    cases = [(count, 0) for count in DECODES] + [MIXED]
    costs = {case: measure(*case, options.repeats, device) for case in cases}
    steps = step_seconds(options.dp_size, 32) if cuda and options.step else {}
    print(f"{LAYERS} layers; goal: at most {GOAL_US:g} us and {GOAL_SHARE:.0%} of a step")
    print(
        "pass                         values us   layers us (checks)   total us   of an eager step"
    )
    for (decodes, chunk), cost in costs.items():
        name = f"{decodes} decodes" + (f", a chunk of {chunk}" if chunk else "")
        layers = f"{cost.layers_us:.1f} ({cost.num_checks})"
        share = "-"
        if not chunk and decodes in steps:
            step_us = steps[decodes] * 1e6
            share = f"{cost.total_us / step_us:.2%} of {step_us / 1e3:.2f} ms"
        print(f"{name:<28} {cost.values_us:>9.1f} {layers:>20} {cost.total_us:>10.1f}   {share}")


def _options() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--dp-size", type=int, default=1, help="ranks of the timed steps")
    parser.add_argument("--step", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
