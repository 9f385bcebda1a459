"""Size, building time and opening time of a report of many steps.

    python -m examples.benchmarks.report_page [--steps 100000] [--dp-size 8] [--browser chromium]

Steps are drawn, without an engine, and written as an experiment writes a run. The page has the same
number of bins whatever the steps, so the floor of its size is that of a page of 1,000 steps; the
floor of the time is reading the same file as plain JSON. With a browser, headless, the page is
opened as a file: from its start to the end of its script, with what the browser itself takes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np

from dp_runtime.experiments import write_report
from dp_runtime.experiments.measurement.figures import figures_of
from dp_runtime.experiments.results.run_files import STEPS, write_run
from dp_runtime.experiments.slo import Slo
from dp_runtime.metrics.recording import ModelSizes, Recording
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace
from examples.benchmarks.harness import machine
from examples.benchmarks.harness.arguments import new_parser

SMALL = 1000
OPEN_S = 60


def drawn_steps(num_steps: int, dp_size: int) -> list[StepTrace]:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 17, (num_steps, dp_size))
    busy_s = rng.uniform(0.001, 0.002, (num_steps, dp_size))
    took_s = busy_s.max(axis=1)
    begin_s = np.cumsum(took_s)
    return [
        drawn_step(rank, at, begin_s[at], rows[at].tolist(), busy_s[at, rank], took_s[at])
        for at in range(num_steps)
        for rank in range(dp_size)
    ]


def drawn_step(
    rank: int, at: int, start_s: float, rows: list[int], busy_s: float, took_s: float
) -> StepTrace:
    wait_s, most = took_s - busy_s, max(rows)
    one = PassTrace("target", tuple(rows), (most,) * len(rows), most, took_s, wait_s, "eager")
    return StepTrace(
        rank, at, 0, start_s, schedule_s=0.0, agree_s=0.0, agree_wait_s=0.0, prepare_s=0.0,
        sample_s=0.0, commit_s=0.0, passes=(one,), output_tokens=rows[rank], prompt_tokens=0,
        prefixes=PrefixCounts(16 * at, 4 * at, 0, at % 500), free_pages=500 - at % 300,
    )  # fmt: skip


def written(directory: Path, num_steps: int, dp_size: int) -> Path:
    steps = drawn_steps(num_steps, dp_size)
    row = {"point": "drawn", "repeat": 0, "error": "", **figures_of((), steps, Slo())}
    write_run(directory, row, (), Recording({}, ModelSizes(0, 0, 0, 0), tuple(steps)))
    return directory


def seconds(call: Callable[[], object]) -> float:
    begun = perf_counter()
    call()
    return perf_counter() - begun


def read_plainly(path: Path) -> None:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            json.loads(line)


def opened(browser: str, page: Path) -> None:
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom")
    command = [browser, *flags, page.resolve().as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=OPEN_S)


def main() -> None:
    options = arguments()
    print(machine.describe("numpy", "dp-runtime"))
    with TemporaryDirectory() as name:
        small = write_report(written(Path(name) / "small", SMALL, options.dp_size))
        many = written(Path(name) / "many", options.steps, options.dp_size)
        floor_s = seconds(lambda: read_plainly(many / STEPS))
        built_s = seconds(lambda: write_report(many))
        page = many / "report.html"
        size, floor = page.stat().st_size / 1e6, small.stat().st_size / 1e6
        print(f"{options.steps:,} steps of {options.dp_size} ranks")
        print(f"size     {size:.2f} MB   floor {floor:.2f} MB   ratio {size / floor:.2f}")
        print(f"building {built_s:.1f} s   floor {floor_s:.1f} s   ratio {built_s / floor_s:.2f}")
        if options.browser:
            times = [seconds(partial(opened, options.browser, at)) for at in (small, page)]
            print(f"opening  {times[1]:.2f} s   floor {times[0]:.2f} s   ({options.browser})")


def arguments() -> argparse.Namespace:
    parser = new_parser(__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    parser.add_argument("--dp-size", type=int, default=8)
    parser.add_argument("--browser", help="program to open the page with, as chromium")
    return parser.parse_args()


if __name__ == "__main__":
    main()
