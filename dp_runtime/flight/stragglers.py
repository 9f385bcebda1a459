"""The rank that the others wait for again and again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dp_runtime.flight.record import RankFlight, StepFlight

MIN_STEPS = 16
MIN_SHARE = 0.2  # of the steps' time, waited for this rank alone
MIN_LAST = 0.6  # of all meetings, at which this rank was the last

Steps = Mapping[tuple[int, int], Sequence[StepFlight]]  # by key: [rank]


@dataclass(frozen=True)
class Straggler:
    dp_rank: int
    num_steps: int
    last: float  # share of the meetings at which it was the last
    lost_us: float  # a step, in which all others waited for it alone
    share: float  # of the steps' time
    rows: float  # of a step, mean
    rows_of_others: float

    def __str__(self) -> str:
        return (
            f"in the last {self.num_steps} busy steps it was the last at {self.last:.0%} of the "
            f"records and collectives; the others waited {self.lost_us / 1e3:.2f} ms a step for it "
            f"alone, {self.share:.0%} of the time. It had {self.rows:.1f} rows a step, the others "
            f"{self.rows_of_others:.1f}"
        )


def find_straggler(ranks: Sequence[RankFlight]) -> Straggler | None:
    steps = common_busy_steps(ranks)
    if len(ranks) < 2 or len(steps) < MIN_STEPS:
        return None
    lost, last = [0.0] * len(ranks), [0] * len(ranks)
    for of_step in steps.values():
        for dp_rank, late_us in lateness(of_step):
            lost[dp_rank] += late_us
            last[dp_rank] += 1
    slowest = max(range(len(ranks)), key=lost.__getitem__)
    total = sum(map(_duration, steps.values()))
    found = Straggler(
        ranks[slowest].dp_rank,
        len(steps),
        last[slowest] / sum(last),
        lost[slowest] / len(steps),
        lost[slowest] / total if total > 0 else 0.0,
        _mean_rows(steps, [slowest]),
        _mean_rows(steps, [rank for rank in range(len(ranks)) if rank != slowest]),
    )
    return found if found.share >= MIN_SHARE and found.last >= MIN_LAST else None


def common_busy_steps(ranks: Sequence[RankFlight]) -> Steps:
    """Steps with work that all ranks have run, by their key."""
    found: dict[tuple[int, int], list[StepFlight]] = defaultdict(list)
    for rank in ranks:
        for step in rank.steps:
            if step.outcome == "run" and step.passes and step.passes[-1].ended_us:
                found[step.key].append(step)
    return {key: steps for key, steps in sorted(found.items()) if len(steps) == len(ranks)}


def lateness(steps: Sequence[StepFlight]) -> Iterator[tuple[int, int]]:
    """Yield who was the last at each meeting of a step, and how long all others had waited."""
    meetings: dict[Hashable, list[int]] = defaultdict(list)
    for step in steps:
        meetings["record"].append(step.posted_us)
        for one in step.collectives:
            meetings[one.number].append(one.entered_us)
    for times in meetings.values():
        if len(times) == len(steps):
            *_, before, latest = sorted(times)
            yield times.index(latest), latest - before


def _duration(steps: Sequence[StepFlight]) -> int:
    return max(s.passes[-1].ended_us for s in steps) - min(s.begun_us for s in steps)


def _mean_rows(steps: Steps, ranks: Sequence[int]) -> float:
    return fmean(sum(of_step[rank].rows) for of_step in steps.values() for rank in ranks)
