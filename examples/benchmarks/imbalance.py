"""Uneven ranks: what a rank's GPU does depends on its own rows, and what padding would cost.

    python -m examples.benchmarks.imbalance --model DIR --requests 1 128 1 1 --requests 0 64 64 64

One number of requests for each rank, all decoding, in graphs. Every load runs three times: as the
runtime does it, each rank's graph at its own rows; even, every rank with the largest rank's
requests; and padded, every rank's graph at the largest rank's rows, as engines do that pad the
batch (null rows run through attention and projections). A rank's busy time is that of its kernels
without the collectives, which are reported beside it: they hold the wait for slower ranks.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from statistics import median

from dp_runtime.parallel.buckets import GraphBuckets
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import add_flags, config_from, new_parser
from examples.benchmarks.harness.kernel_profile import Profile
from examples.benchmarks.harness.stepping import Load, SteppedRank, Window, run_ranks

PROMPT, OUTPUT = 1024, 96
COLLECTIVES = ("gather_kernel", "reduce_scatter", "ncclDevKernel")


class PaddedBuckets(GraphBuckets):
    """Every rank's graph has the rows of the largest rank."""

    def local(self, rows: int) -> int:
        return self.max_rows

    def gathered(self, largest: int) -> int:
        return self.max_rows


@dataclass(frozen=True)
class Busy:
    """What one rank's GPU did in a step, in microseconds."""

    step_us: float
    busy_us: float
    collectives_us: float

    @classmethod
    def from_profile(cls, profile: Profile, step_us: float) -> Busy:
        waits = [
            time for name, _, time in profile.kernels if any(part in name for part in COLLECTIVES)
        ]
        total = sum(time for _, _, time in profile.kernels)
        return cls(step_us, total - sum(waits), sum(waits))


def main() -> None:
    args = parse_args()
    print(machine.describe("torch"), flush=True)
    for counts in args.requests:
        largest, size = max(counts), len(counts)
        config = config_from(
            args, dp_size=size, load_format="dummy", launcher="local", device="cuda",
            cuda_graphs=True, overlap=True, max_num_requests=largest, max_num_tokens=8192,
            max_model_len=args.prompt + args.output + 64,
        )  # fmt: skip
        even = [largest] * size
        ways = [("own rows", counts, False), ("even", even, False), ("padded", counts, True)]
        results = run_ranks(config, measure, ways, args.prompt, args.output)
        for number, (way, requests, _) in enumerate(ways):
            for rank, found in enumerate(results):
                busy: Busy = found[number]
                figures = {
                    "way": way,
                    "requests": requests,
                    "rank": rank,
                    "own_rows": requests[rank],
                    "step_us": round(busy.step_us, 1),
                    "busy_us": round(busy.busy_us, 1),
                    "collectives_and_waits_us": round(busy.collectives_us, 1),
                }
                print(json.dumps(figures), flush=True)


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    add_flags(parser, "model", "moe_sharding", "collective")
    parser.add_argument("--requests", type=int, nargs="+", action="append", required=True)
    parser.add_argument("--prompt", type=int, default=PROMPT)
    parser.add_argument("--output", type=int, default=OUTPUT)
    return parser.parse_args()


def measure(
    rank: SteppedRank, ways: list[tuple[str, list[int], bool]], prompt: int, output: int
) -> list[Busy]:
    """Profile decode steps of every way, this rank's kernels."""
    results = []
    for _, counts, padded in ways:
        if padded:
            rank.capture(PaddedBuckets)
        load = Load((prompt,) * counts[rank.dp_rank], output)
        steps = rank.run(load).steps_of(counts)
        window = Window(tuple(counts), 10, 20)
        profile = rank.run(load, window).profile
        assert profile is not None, "every load has enough decode steps to profile some"
        results.append(Busy.from_profile(profile, median(steps) * 1e6))
    return results


if __name__ == "__main__":
    main()
