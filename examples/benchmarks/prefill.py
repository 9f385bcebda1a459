"""Prefill: tokens a second, beside two floors, and where the time goes.

    python -m examples.benchmarks.prefill --model DIR --dp-size 4 --rows 8192 2048

Every rank has prompts of 1024 tokens enough for some full steps of so many rows. The floor of the
operations is the matrix operations of the rank's rows and of its share of the experts at the
measured rate of a large product, without attention's own. The floor of a step (on GPUs) is the sum
of what each group of kernels must compute or read, whichever takes longer: small steps read all
experts for few rows. Steps of up to 4096 rows replay graphs, if not told --no-cuda-graphs.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import median

from dp_runtime.models.config import ModelConfig
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser
from examples.benchmarks.harness.kernel_groups import (
    RankRows,
    floors_us,
    group_table,
    measured_rates,
)
from examples.benchmarks.harness.kernel_profile import Profile
from examples.benchmarks.harness.stepping import Load, SteppedRank, Window, run_ranks

FULL_STEPS = 6


@dataclass(frozen=True)
class Measured:
    """Full steps of one size, as rank 0 saw them."""

    step_s: float
    profile: Profile | None


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), flush=True)
    operations = matmul_rate(args.device)
    model = read_model_config(args.model)
    for rows in args.rows:
        count = max(FULL_STEPS * rows // args.prompt, 1)
        config = config_from(
            args, load_format="dummy", launcher="local", overlap=True,
            max_num_requests=min(count, rows), max_num_tokens=rows, max_model_len=args.prompt + 8,
        )  # fmt: skip
        window = Window((rows,) * args.dp_size, 1, 3) if args.device == "cuda" else None
        load = Load((args.prompt,) * count, 2)
        found: Measured = run_ranks(config, measure, load, window)[0]
        floor = operations_of(model, rows) / operations
        report(args, model, rows, found, floor)


def report(
    args: argparse.Namespace, model: ModelConfig, rows: int, measured: Measured, floor: float
) -> None:
    figures = {
        "rows_a_rank": rows,
        "step_ms": round(measured.step_s * 1e3, 2),
        "operations_ms": round(floor * 1e3, 2),
        "times_operations": round(measured.step_s / floor, 2),
        "tokens_s_a_rank": round(rows / measured.step_s),
    }
    profile = measured.profile
    if profile is not None:
        own = RankRows(rows, args.prompt / 2, 0, 1, 0.0, rows * args.dp_size, args.dp_size)
        floors = floors_us(model, own, measured_rates())
        floor_ms = sum(floors.values()) / 1e3
        figures["floor_ms"] = round(floor_ms, 2)
        figures["times_floor"] = round(measured.step_s * 1e3 / floor_ms, 2)
        table = profile if args.kernels else group_table([profile], ["rank 0"], [floors])
        print(f"\n{rows} rows a rank:\n{table}")
        figures["gpu_idle"] = round(profile.idle_us / profile.span_us, 4)
    print(json.dumps(figures), flush=True)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(
        parser, "model", "dp_size", "device", "moe_sharding", "moe_backend", "collective",
        "cuda_graphs", "kernels",
    )  # fmt: skip
    parser.add_argument("--rows", type=int, nargs="+", default=[8192])
    parser.add_argument("--prompt", type=int, default=1024)
    return parser.parse_args()


def measure(rank: SteppedRank, load: Load, window: Window | None) -> Measured:
    """Serve the load twice: to time its full steps, and to profile them."""
    rank.run(load)  # warm
    times = rank.run(load).steps_of([rank.config.max_num_tokens] * rank.config.dp_size)
    profile = rank.run(load, window).profile if window else None
    return Measured(median(times), profile)


def matmul_rate(device: str) -> float:
    """Operations a second."""
    if device == "cpu":
        return 5e10
    from examples.benchmarks.harness import device_timing

    print(device_timing.describe_gpu(), flush=True)
    return device_timing.matmul_rate()


def operations_of(model: ModelConfig, rows: int) -> float:
    """Matrix operations of a rank for its own rows; its experts' share is as large on average."""
    heads = 2 * model.num_heads + 2 * model.num_kv_heads
    attention = heads * model.head_dim * model.hidden_size
    experts = 3 * model.moe_intermediate_size * model.hidden_size * model.num_experts_per_tok
    return 2.0 * rows * (model.num_layers * attention + model.num_moe_layers * experts)


if __name__ == "__main__":
    main()
