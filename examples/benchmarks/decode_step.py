"""A decode step: its time, its floor, and where each microsecond goes, kernel by kernel.

    python -m examples.benchmarks.decode_step --model DIR --dp-size 4 --requests 16 64 128
    python -m examples.benchmarks.decode_step --shape qwen3.5-35b-a3b --dp-size 1

DIR may hold a config.json only, and weights are dummies; --shape takes one of
examples/nvl4/shape.py, --num-layers of it if not all. Every rank decodes
so many requests, prompts of 1024 and outputs of 256 tokens, in the runtime's own step loop. A step
is timed where every rank has all its requests decoding; the table is rank 0's, by kernel group
(--kernels: every kernel), from a profile of other steps than the timed ones. The floor is, part by
part, what a rank must read, with the experts that the routing of these steps really used
(`active`), at --read-rate or at the measured rate; or what it must compute, where that takes longer
(verifications of many rows). Recurrent states it reads and writes. `times_reading` is the step over
all that it must read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dp_runtime.kernels.split_tile import SplitTile
from dp_runtime.metrics.trace import StepTrace
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser, write_figures
from examples.benchmarks.harness.floors import (
    DecodeBytes,
    DecodeOperations,
    longer_parts_s,
    uniform_active,
)
from examples.benchmarks.harness.kernel_groups import (
    ATTENTION,
    DENSE,
    EXPERTS,
    STATES,
    Rates,
    group_table,
    num_launches,
)
from examples.benchmarks.harness.kernel_profile import Profile
from examples.benchmarks.harness.split_decode import attend_by
from examples.benchmarks.harness.stepping import (
    Load,
    Routed,
    SteppedRank,
    Window,
    run_ranks,
)
from examples.nvl4.shape import SHAPES, write_shape

PROMPT, OUTPUT = 1024, 256
COUNTED_STEPS = 4


@dataclass(frozen=True)
class Measured:
    """One number of requests a rank, as rank 0 saw it."""

    requests: int
    tile: SplitTile | None  # of attention, of those that --split adds
    step_ms: tuple[float, float, float]  # p10, p50, p99
    routed: Routed | None  # None if no step had the rows of all requests
    distinct_last_tokens: float
    tokens_per_verification: float  # 1 without speculation
    profile: Profile | None


def main() -> None:
    args = parse_args()
    with TemporaryDirectory() as directory:
        if args.shape is not None:
            drafts = int(args.speculative_num_steps > 0)
            args.model = str(
                write_shape(
                    Path(directory), args.shape, mtp_layers=drafts, num_layers=args.num_layers
                )
            )
        run(args)


def run(args: argparse.Namespace) -> None:
    config = config_from(
        args, load_format="dummy", launcher="local", max_num_requests=max(args.requests),
        max_num_tokens=8192, max_model_len=args.prompt + args.output + 64,
        speculative_forced_tokens=args.forced_tokens,
    )  # fmt: skip
    print(machine.describe("torch"), config, sep="\n", flush=True)
    profiled = args.profile_steps if args.device == "cuda" else 0
    loads = [(count, Load((args.prompt,) * count, args.output)) for count in args.requests]
    tiles = [None] if args.split is None else [None, SplitTile(*args.split)]
    results = run_ranks(config, measure, tiles, loads, profiled)[0]
    rates = measured_rates(args.device)
    if args.read_rate is not None:
        rates = replace(rates, read=args.read_rate * 1e12)
    for measured in results:
        report(args, measured, rates)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(
        parser, "dp_size", "device", "moe_sharding", "moe_backend", "dense_backend", "collective",
        "cuda_graphs", "overlap", "speculative_num_steps", "speculative_draft_vocab",
        "forced_tokens", "read_rate", "json", "kernels",
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model")
    source.add_argument("--shape", choices=sorted(SHAPES))
    parser.add_argument("--num-layers", type=int, help="of the shape, if not all")
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--output", type=int, default=OUTPUT)
    parser.add_argument(
        "--split", type=int, nargs=4, metavar=("BLOCK", "WARPS", "STAGES", "PROGRAMS"),
        help="beside XQA, by the kernel of attention_decode with this tile",
    )  # fmt: skip
    parser.add_argument("--profile-steps", type=int, default=20)
    return parser.parse_args()


def measure(
    rank: SteppedRank,
    tiles: list[SplitTile | None],
    loads: list[tuple[int, Load]],
    profile_steps: int,
) -> list[Measured]:
    """Serve every load three times: to time it, to profile it, and to count the experts used."""
    results = []
    size = rank.config.dp_size
    for tile, (count, load) in product(tiles, loads):
        if len(tiles) > 1:
            attend_by(rank, tile)
        timed = rank.run(load)
        times = np.array(timed.steps_of((count,) * size)) * 1e3
        p10, p50, p99 = (float(np.quantile(times, q)) for q in (0.1, 0.5, 0.99))
        window = Window((count,) * size, 10, profile_steps)
        profile = rank.run(load, window).profile if profile_steps else None
        query_len = 1 + rank.config.speculative_num_steps
        with rank.counting(count * size * query_len) as counted:
            prefill = sum(load.prompt_lens) // rank.config.max_num_tokens + 1
            rank.run(Load(load.prompt_lens, (prefill + COUNTED_STEPS) * query_len))
        last = timed.last_tokens.values()
        distinct = len(set(last)) / len(last)
        routed = Routed.from_counts(counted, size) if counted else None
        emitted = tokens_per_verification(timed.steps)
        times_ms = (p10, p50, p99)
        results.append(Measured(count, tile, times_ms, routed, distinct, emitted, profile))
    return results


def tokens_per_verification(steps: Sequence[StepTrace]) -> float:
    """Mean of the steps of one rank that verify; 1 if none does."""
    accepted = [(n, count) for step in steps for n, count in enumerate(step.accepted)]
    verifications = sum(count for _, count in accepted)
    return 1 + sum(n * count for n, count in accepted) / max(verifications, 1)


def measured_rates(device: str) -> Rates:
    """What a large copy reads and writes, and a large product computes; no wire is counted."""
    if device == "cpu":
        return Rates(2e10, 5e10, math.inf)
    from examples.benchmarks.harness.device_timing import describe_gpu, matmul_rate, read_rate

    print(describe_gpu())
    return Rates(read_rate(), matmul_rate(), math.inf)


def report(args: argparse.Namespace, measured: Measured, rates: Rates) -> None:
    model = read_model_config(args.model)
    rows = measured.requests * (1 + args.speculative_num_steps) * args.dp_size
    uniform = uniform_active(model, rows)
    context, drafts = args.prompt + args.output / 2, args.speculative_num_steps
    floor_bytes = DecodeBytes.for_step(
        model, args.dp_size, measured.requests, context,
        measured.routed.active_experts if measured.routed else None, drafts,
        args.speculative_draft_vocab, args.dense_backend == "triton",
    )  # fmt: skip
    operations = DecodeOperations.for_step(
        model, measured.requests, context, drafts, args.speculative_draft_vocab
    )
    parts = longer_parts_s(floor_bytes, operations, rates.read, rates.matmul)
    floor, (p10, p50, p99) = sum(parts.values()) * 1e3, measured.step_ms
    figures: dict[str, float | str] = {
        "requests_a_rank": measured.requests,
        "step_ms_p10": round(p10, 3),
        "step_ms_p50": round(p50, 3),
        "step_ms_p99": round(p99, 3),
        "floor_ms": round(floor, 3),
        "times_floor": round(p50 / floor, 3),
        "times_reading": round(p50 / floor_bytes.milliseconds(rates.read), 3),
        "read_rate_tb_s": round(rates.read / 1e12, 2),
        "distinct_last_tokens": round(measured.distinct_last_tokens, 3),
    }
    if measured.tile is not None:
        figures["tile"] = str(measured.tile)
    if measured.routed:
        figures["active_experts"] = round(measured.routed.active_experts, 2)
        figures["of_uniform"] = round(measured.routed.active_experts / uniform, 4)
        figures["max_mean_load"] = round(measured.routed.load, 3)
    if args.speculative_num_steps:
        emitted = measured.tokens_per_verification
        figures["tokens_per_verification"] = round(emitted, 3)
        figures["ms_a_token"] = round(p50 / emitted, 3)
    attention = f", {measured.tile}" if measured.tile is not None else ""
    print(f"\n{measured.requests} requests a rank{attention}; {floor_bytes}")
    if measured.profile is not None:
        profile = measured.profile
        figures["gpu_idle"] = round(profile.idle_us / profile.span_us, 4)
        figures["small_launches"] = round(num_launches(profile))
        floors = by_group_us(parts)
        print(profile if args.kernels else group_table([profile], ["rank 0"], [floors]))
    write_figures(figures, args.json)


def by_group_us(parts: Mapping[str, float]) -> dict[str, float]:
    """The floor's parts, in seconds, by kernel group."""
    dense = parts["dense_weights"] + parts["lm_head"]
    seconds = {
        ATTENTION: parts["kv_cache"],
        EXPERTS: parts["experts"],
        DENSE: dense,
        STATES: parts["states"],
    }
    return {group: value * 1e6 for group, value in seconds.items()}


if __name__ == "__main__":
    main()
