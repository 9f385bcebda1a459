"""Synthetic runs: steps without an engine, and directories of results that hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dp_runtime.experiments.measurement.figures import figures_of
from dp_runtime.experiments.measurement.request_record import RequestRecord
from dp_runtime.experiments.results.run_files import write_json, write_run
from dp_runtime.experiments.slo import Slo
from dp_runtime.metrics.recording import ModelSizes, Recording
from dp_runtime.metrics.trace import PassTrace, PrefixCounts, StepTrace


def make_steps(num_steps: int, dp_size: int = 2, seed: int = 0) -> list[StepTrace]:
    """Draw steps in which the last rank is always idle, and one of the others is slow."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 9, (num_steps, dp_size))
    rows[:, -1] = 0
    busy_s = rng.uniform(0.001, 0.002, (num_steps, dp_size))
    slowest_s = busy_s.max(axis=1)
    start_s = 100 + np.concatenate([[0], np.cumsum(slowest_s)])
    return [
        _step(rank, at, start_s[at], rows[at], busy_s[at, rank], slowest_s[at] - busy_s[at, rank])
        for at in range(num_steps)
        for rank in range(dp_size)
    ]


def _step(
    rank: int, at: int, start_s: float, rows: np.ndarray[Any, Any], busy_s: float, wait_s: float
) -> StepTrace:
    most = int(rows.max())
    one = PassTrace(
        "target", tuple(rows.tolist()), (most,) * len(rows), 4 * most, busy_s / 2 + wait_s, wait_s,
        "eager", start_s + busy_s / 4, prepare_s=busy_s / 8,
    )  # fmt: skip
    return StepTrace(
        rank, at, 0, start_s, schedule_s=busy_s / 8, agree_s=busy_s / 8, agree_wait_s=0.0,
        prepare_s=busy_s / 8, sample_s=busy_s / 16, commit_s=busy_s / 16, passes=(one,),
        output_tokens=int(rows[rank]), prompt_tokens=at % 3, num_drafts=2, accepted=(1, 0, 1),
        sample_start_s=start_s + busy_s * 0.8 + wait_s, position=rank,
        prefixes=PrefixCounts(10 * at, 4 * at, 0, at % 7),
        commit_start_s=start_s + busy_s * 0.9 + wait_s, free_pages=9 - at % 7,
    )  # fmt: skip


def make_requests(count: int, scale: float = 1.0) -> list[RequestRecord]:
    gaps = [scale * (0.01 + 0.001 * number) for number in range(count)]
    done = []
    for at, gap in enumerate(gaps):
        begun = 0.1 * at
        arrivals = ((begun + gap, 1), (begun + 3 * gap, 2))
        done.append(RequestRecord(at, 0, at % 2, 8, begun, begun, arrivals))
    return [*done, RequestRecord(count, 0, -1, 8, 0.0, 0.0, (), "lost")]


def write_results(
    directory: Path, points: Sequence[Mapping[str, Any]], repeats: int = 2, scale: float = 1.0
) -> Path:
    """Write what an experiment would have written of points that differ in speed."""
    slo = Slo(ttft_ms=15.0)
    keys = [f"key{number}" for number in range(len(points))]
    for number, key in enumerate(keys):
        for repeat in range(repeats):
            steps = make_steps(20, seed=10 * number + repeat)
            requests = make_requests(9, scale * (number + 1) * (1 + 0.01 * repeat))
            row = {"point": key, "repeat": repeat, "error": "", **figures_of(requests, steps, slo)}
            recording = Recording({}, ModelSizes(0, 0, 0, 0), tuple(steps))
            write_run(directory / "runs" / f"{key}-{repeat}", row, requests, recording)
    write_json(
        directory / "run.json",
        {
            "name": directory.name, "settings": {"workload": {"num_requests": 9}},
            "slo": vars(slo), "machines": [{"cpu": "one", "versions": {"torch": "2"}}],
            "points": dict(zip(keys, points)), "noise_floor": {"output_tok_s": 0.01},
            "configs": {key: {"padding": "max_len", "seed": scale} for key in keys},
        },
    )  # fmt: skip
    return directory
