"""Steps with a prompt beside decodes: time by kernel group beside its floor, and idle GPUs.

    python -m examples.benchmarks.mixed_step --model DIR --dp-size 4 --chunks 512 1024 2048
    ... --speculative-num-steps 3

Rank 0 prefills prompts of 4096 tokens in full chunks while every other rank decodes --decoders
requests. For each chunk: steps timed without a profiler, then some
others profiled on all ranks; a table of rank 0's and rank 1's kernels, and a JSON line with each
rank's idle share, its busy time without collectives (they hold the wait for slower ranks), and the
p99 of the time between tokens of the decodes over the prefilling rank's busy time: over that of the
slowest of the profiled steps, all chunks of a prompt or more (later ones see more keys),
and over their mean. Floors are of the target's pass; drafts have none here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dp_runtime.models.config import ModelConfig
from dp_runtime.models.registry import read_model_config
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser
from examples.benchmarks.harness.kernel_groups import (
    RankRows,
    Rates,
    busy_us,
    busy_us_of_steps,
    collective_us,
    floors_us,
    group_table,
    measured_rates,
    num_launches,
)
from examples.benchmarks.harness.kernel_profile import Profile, StepProfiler
from examples.benchmarks.harness.stepping import SteppedRank, run_ranks
from examples.benchmarks.interference import PREFILLING, Experiment, View

IDS_A_RUN = 1000
PAGE_SIZE = 64
SKIPPED, PROFILED = 3, 8  # steps with prefill; 8 chunks of 512 are a prompt


@dataclass(frozen=True)
class Measured:
    """One chunk, as one rank saw it."""

    timed: View
    profile: Profile


def main() -> None:
    args = parse_args()
    print(machine.describe("torch", "flashinfer-python"), flush=True)
    experiments = {chunk: experiment(args, chunk) for chunk in args.chunks}
    longest = max(each.output_len(chunk) for chunk, each in experiments.items())
    requests = max(args.decoders, *(each.num_prompts for each in experiments.values()))
    max_model_len = max(args.prompt + 1, args.context + longest)
    pages = -(-requests * (max_model_len + args.speculative_num_steps) // PAGE_SIZE) + requests
    config = config_from(
        args, load_format="dummy", launcher="local", device="cuda", overlap=True,
        max_num_requests=requests, max_num_tokens=max(args.chunks), max_model_len=max_model_len,
        page_size=PAGE_SIZE, num_pages=pages,
    )  # fmt: skip
    print(config, flush=True)
    ranks: list[dict[int, Measured]] = run_ranks(config, measure, experiments)
    rates, model = measured_rates(), read_model_config(args.model)
    for chunk in args.chunks:
        report(args, model, rates, chunk, [found[chunk] for found in ranks])


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(
        parser, "model", "dp_size", "moe_sharding", "moe_backend", "collective", "cuda_graphs",
        "speculative_num_steps", "kernels",
    )  # fmt: skip
    parser.add_argument("--chunks", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--decoders", type=int, default=32, help="requests of every other rank")
    parser.add_argument("--context", type=int, default=1024, help="their prompts")
    args = parser.parse_args()
    if args.dp_size < 2:
        parser.error("--dp-size: one rank prefills and at least one decodes")
    return args


def experiment(args: argparse.Namespace, chunk: int) -> Experiment:
    """Prompts for some more full chunks than are skipped and profiled, all there at once."""
    prompts = -(-(SKIPPED + PROFILED + 3) * chunk // args.prompt)
    per_step = args.speculative_num_steps + 1
    return Experiment(args.prompt, prompts, args.decoders, args.context, per_step, at_once=prompts)


def measure(rank: SteppedRank, experiments: dict[int, Experiment]) -> dict[int, Measured]:
    """Each chunk: a run to warm up, one to be timed, and one to be profiled."""
    found, first_id = {}, 0
    for chunk, each in experiments.items():
        profiler = StepProfiler(SKIPPED, PROFILED)
        views = []
        for watched in (None, None, profiler):
            views.append(each.observe(rank, "together", chunk, first_id, watched))
            first_id += IDS_A_RUN
        assert profiler.profile is not None, f"fewer steps with prefill than {PROFILED}"
        found[chunk] = Measured(views[1], profiler.profile)
    return found


def report(
    args: argparse.Namespace,
    model: ModelConfig,
    rates: Rates,
    chunk: int,
    ranks: Sequence[Measured],
) -> None:
    profiles = [found.profile for found in ranks]
    floors = [floors_us(model, rows, rates) for rows in rows_of(args, chunk)]
    print(f"\nchunks of {chunk}:")
    print(group_table(profiles[:2], ("prefills", "decodes"), floors))
    if args.kernels:
        print(*profiles[:2], sep="\n")
    steps = ranks[PREFILLING].timed.prefill_step_s()
    gaps = [gap.seconds for found in ranks[1:] for gap in found.timed.gaps_with_prefill()]
    p99 = float(np.quantile(gaps, 0.99)) * 1e3
    prefilling = profiles[PREFILLING]
    assert len(prefilling.by_step) == PROFILED, "its stages' first kernels were recognised"
    slowest, all_of_slowest = (max(busy_us_of_steps(prefilling, w)) / 1e3 for w in (False, True))
    busy = busy_us(prefilling) / 1e3
    on_device = busy + collective_us(prefilling) / 1e3
    figures = {
        "chunk": chunk,
        "speculative_num_steps": args.speculative_num_steps,
        "step_ms_p50": round(float(np.median(steps)) * 1e3, 2),
        "between_tokens_ms_p50": round(float(np.median(gaps)) * 1e3, 2),
        "between_tokens_ms_p99": round(p99, 2),
        "busy_ms": [round(busy_us(each) / 1e3, 2) for each in profiles],
        "busy_ms_slowest": round(slowest, 2),
        "p99_over_slowest": round(p99 / slowest, 3),
        "p99_over_slowest_and_collectives": round(p99 / all_of_slowest, 3),
        "p99_over_busy": round(p99 / busy, 3),
        "p99_over_busy_and_collectives": round(p99 / on_device, 3),
        "floor_ms": [round(sum(floor.values()) / 1e3, 2) for floor in floors],
        "idle": [round(each.idle_us / each.span_us, 4) for each in profiles],
        "small_launches": [round(num_launches(each)) for each in profiles],
    }
    print(json.dumps(figures), flush=True)


def rows_of(args: argparse.Namespace, chunk: int) -> tuple[RankRows, RankRows]:
    """Of the prefilling rank, and of one that decodes."""
    per_request = args.speculative_num_steps + 1
    others = (args.dp_size - 1) * args.decoders * per_request
    shared = {"query_len": per_request, "total": chunk + others, "dp_size": args.dp_size}
    prefills = RankRows(chunk, args.prompt / 2, 0, decode_context=0.0, **shared)
    return prefills, RankRows(0, 0.0, args.decoders, decode_context=args.context, **shared)


if __name__ == "__main__":
    main()
