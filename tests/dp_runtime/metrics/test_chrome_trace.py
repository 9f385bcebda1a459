"""A trace has a process for each rank, tracks in order, and one clock for all hosts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dp_runtime.metrics.chrome_trace import chrome_trace
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.metrics.trace import PassTrace, StepTrace
from tests.traces import check_trace


def step(rank: int, step_id: int, start_s: float) -> StepTrace:
    one = PassTrace(
        "target", (2, 4, 1), (4, 4, 4), 8, forward_s=0.5, wait_s=0.2, mode="eager",
        start_s=start_s + 0.12, prepare_s=0.03,
    )  # fmt: skip
    return StepTrace(
        rank, step_id, 0, start_s, schedule_s=0.01, agree_s=0.02, agree_wait_s=0.06,
        prepare_s=0.03, sample_s=0.04, commit_s=0.05, passes=(one,), output_tokens=2,
        prompt_tokens=1, sample_start_s=start_s + 0.62, commit_start_s=start_s + 0.66,
    )  # fmt: skip


def health(rank: int, host: str, clock_offset_ns: int) -> RankHealth:
    return RankHealth(
        rank, RankState.IDLE, pid=40 + rank, host=host, clock_offset_ns=clock_offset_ns
    )


def test_phases_waits_and_rows_of_a_step() -> None:
    text = "".join(chrome_trace([step(1, 3, 10.0)], [health(0, "a", 0), health(1, "a", 5)]))
    events = check_trace(text)
    slices = [event for event in events if event["ph"] == "X"]
    shown = [(e["name"], e["tid"], e["ts"], e["dur"]) for e in slices]
    assert shown == [
        (name, track, pytest.approx(ts, abs=1e-2), pytest.approx(dur, abs=1e-2))
        for name, track, ts, dur in (
            ("schedule", 1, 0, 10_000), ("agree", 1, 10_000, 80_000),
            ("wait for records", 2, 30_000, 60_000), ("prepare target", 1, 90_000, 30_000),
            ("target (eager)", 1, 120_000, 500_000), ("wait in collectives", 2, 420_000, 200_000),
            ("sample", 1, 620_000, 40_000), ("commit", 1, 660_000, 50_000),
        )
    ]  # fmt: skip
    assert {e["pid"] for e in slices} == {2}
    assert {e["args"]["step"] for e in slices} == {3}
    (rows,) = [event for event in events if event["ph"] == "C"]
    assert (rows["name"], rows["args"]) == ("rows of target", {"real": 4, "padding": 0})
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["rank 0 (a, pid 40)", "rank 1 (a, pid 41)"]


def starts(text: str) -> Iterator[tuple[int, float]]:
    return ((e["pid"] - 1, e["ts"]) for e in check_trace(text) if e["name"] == "schedule")


def test_ranks_of_several_hosts_share_a_clock() -> None:
    """Their own began at other times: 100 s on one is 700 s on the other."""
    steps = [step(0, 0, 100.0), step(1, 0, 100.5), step(2, 0, 700.25)]
    ranks = [
        health(0, "a", 10**18),
        health(1, "a", 10**18 + 9),
        health(2, "b", 10**18 - 600 * 10**9),
    ]
    found = dict(starts("".join(chrome_trace(steps, ranks))))
    assert found == pytest.approx({0: 0.0, 1: 500_000, 2: 250_000}, abs=0.5)


def test_with_overlap_a_commit_comes_after_the_next_launch() -> None:
    first, second = step(0, 0, 10.0), step(0, 1, 10.7)
    first, second = replace(first, commit_start_s=11.4), replace(second, commit_start_s=12.5)
    check_trace("".join(chrome_trace([first, second], [health(0, "a", 0)])))


def test_a_trace_without_a_step_is_valid() -> None:
    assert len(check_trace("".join(chrome_trace([], [health(0, "a", 0)])))) == 4
