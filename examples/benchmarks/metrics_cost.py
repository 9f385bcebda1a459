"""What metrics cost: a step of a rank, a delta on the driver, and a scrape.

    python -m examples.benchmarks.metrics_cost

Prints medians in microseconds of what is counted in a step and in a delta, and of what a scrape
takes from a rank and from the server; shares are of a decode step of 7 ms (RESULTS.md).
"""

from __future__ import annotations

import argparse
import os
from statistics import median
from time import thread_time

from dp_runtime.core.request import FinishReason
from dp_runtime.metrics.prometheus.page import metrics_page
from dp_runtime.metrics.request_totals import RequestTotals
from dp_runtime.metrics.snapshot import RankSnapshot
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.totals import Recorder
from dp_runtime.metrics.trace import PassTrace, StepTrace
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser
from examples.benchmarks.harness.timing import measure

GPU_STEP_US = 7000.0
SCRAPE_EVERY_US = 15e6  # what Prometheus does unless told otherwise


def main() -> None:
    args = parse_args()
    print(machine.describe("prometheus_client"), f"; load {os.getloadavg()[0]:.1f}")
    for name, num_drafts in (("plain", 0), ("3 drafts", 3)):
        cost = time_step(args.dp_size, num_drafts)
        print(f"a {name} step: {cost:.1f} us, {cost / GPU_STEP_US:.2%} of {GPU_STEP_US / 1e3:g} ms")
    print(f"a delta: {time_delta():.2f} us; the end of a request: {time_end():.2f} us")
    copy, page, size = time_scrape(args.dp_size)
    print(
        f"a scrape of {args.dp_size} ranks: {copy:.1f} us of a rank, {page / 1e3:.1f} ms of the "
        f"server for {size / 2**10:.0f} KiB, {page / SCRAPE_EVERY_US:.2%} at one in 15 s"
    )


def parse_args() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--dp-size", type=int, default=4)
    return parser.parse_args()


def step_of(dp_size: int, num_drafts: int) -> StepTrace:
    kinds = ["draft"] * num_drafts + ["target"] + ["draft_extend"] * bool(num_drafts)
    passes = [
        PassTrace(kind, (30,) * dp_size, (32,) * dp_size, 64, 5e-3, 1e-4, "graph") for kind in kinds
    ]
    return StepTrace(
        0, 1, 0, 1.0, schedule_s=1e-4, agree_s=1e-4, agree_wait_s=1e-4, prepare_s=1e-4,
        sample_s=1e-4, commit_s=1e-4, passes=tuple(passes), output_tokens=32, prompt_tokens=0,
        num_drafts=num_drafts, accepted=(8,) * (num_drafts + 1),
    )  # fmt: skip


def time_step(dp_size: int, num_drafts: int) -> float:
    recorder, step = Recorder(0), step_of(dp_size, num_drafts)

    def count() -> None:
        recorder.add(step)
        recorder.totals.add_wait(1, 1e-4)

    return measure(count, 20_000).median_us


def time_delta() -> float:
    totals = RequestTotals(0)
    return measure(lambda: totals.add_tokens(0.02, 1, first=False), 20_000).median_us


def time_end() -> float:
    totals = RequestTotals(0)
    return measure(lambda: totals.add_end(FinishReason.STOP, 2.5), 20_000).median_us


def time_scrape(dp_size: int) -> tuple[float, float, int]:
    """Return microseconds of a rank and of the server, in CPU time, and the bytes of the page."""
    recorder = Recorder(0)
    for _ in range(100):
        recorder.add(step_of(dp_size, 3))
    totals = recorder.totals
    ranks = [
        RankSnapshot(True, RankHealth(rank, RankState.RUNNING), totals, RequestTotals(rank))
        for rank in range(dp_size)
    ]
    spent, size = [], 0
    for _ in range(20):
        start = thread_time()
        size = len(metrics_page(ranks, "model"))
        spent.append((thread_time() - start) * 1e6)
    return measure(totals.copied, 2000).median_us, median(spent), size


if __name__ == "__main__":
    main()
