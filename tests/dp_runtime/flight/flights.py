"""Ranks that only pretend to step, and note it as real ones do, by a clock of the test's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from dp_runtime.core.step_program import SERVING_PROGRAMS
from dp_runtime.flight.reading import read_ring
from dp_runtime.flight.record import FlightDump, Source
from dp_runtime.flight.recorder import FlightRecorder, Kind
from dp_runtime.flight.ring import RingLayout
from dp_runtime.parallel.agreement import StepRecord, agree

MS = 1_000_000
STEP_MS = 10.0  # from one record to the next
LAYERS = 2


@dataclass
class Clock:
    now_ns: int = 10**12

    def __call__(self) -> int:
        return self.now_ns

    def set(self, ms: float) -> None:
        self.now_ns = 10**12 + round(ms * MS)


@dataclass
class Flights:
    """dp_size ranks in lockstep; `late` says by how many ms a rank comes to each meeting."""

    clock: Clock
    dp_size: int = 4
    epoch: int = 0
    late: Callable[[int, int], float] = lambda rank, step: 0.1 * ((rank + step) % 4)
    ranks: list[FlightRecorder] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        layout = RingLayout(self.dp_size, 1, 2 * LAYERS)
        self.ranks = [FlightRecorder.in_process(rank, layout) for rank in range(self.dp_size)]
        for rank in self.ranks:
            rank.join(self.epoch, "in_process")

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            records = [self.record(rank) for rank in range(self.dp_size)]
            for rank in range(self.dp_size):
                self.run(rank, records)
            self.steps += 1

    def record(self, rank: int) -> StepRecord:
        return StepRecord(self.epoch, self.steps, 0, (rank + 1,), queued_tokens=7 * rank)

    def post(self, rank: int) -> None:
        flight = self.ranks[rank]
        self._at(rank, 0.0)
        flight.schedule(self.steps)
        self._at(rank, 1.0)
        flight.post(self.record(rank))

    def run(self, rank: int, records: Sequence[StepRecord], stop_in: int = 2 * LAYERS) -> None:
        """One rank's part of a step; it hangs in the collective number `stop_in` of the step."""
        flight = self.ranks[rank]
        self.post(rank)
        agreement = agree(records, SERVING_PROGRAMS)
        self._at(rank, 2.0, late=False)
        flight.agree(agreement)
        flight.begin_pass(0)
        for number in range(2 * LAYERS):
            self._at(rank, 3.0 + number)
            flight.enter(Kind(1 + number % 2), agreement.plans[0].padding.total_gathered, 256)
            if number == stop_in:
                return
            self._at(rank, 3.9 + number, late=False)
            flight.leave()
        flight.end_pass()
        flight.sample()
        flight.commit(self.steps)
        self._at(rank, 9.0, late=False)
        flight.committed(self.steps)

    def dump(self, after_ms: float = 0.0, reason: str = "on demand") -> FlightDump:
        flights = [read_ring(flight.snapshot(), Source.MEMORY) for flight in self.ranks]
        end = STEP_MS * self.steps + after_ms
        taken = self.clock.now_ns if not after_ms else 10**12 + round(end * MS)
        taken_us = taken // 1000 + flights[0].clock_offset_us
        return FlightDump(reason, taken_us, tuple(flights))

    def _at(self, rank: int, ms: float, late: bool = True) -> None:
        extra = self.late(rank, self.steps) if late else 0.0
        self.clock.set(STEP_MS * self.steps + ms + extra)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of recorders; that of a host whose wall clock began with it."""
    one = Clock()
    monkeypatch.setattr("dp_runtime.flight.recorder.perf_counter_ns", one)
    monkeypatch.setattr("dp_runtime.flight.ring.wall_offset_ns", lambda: 10**18)
    return one
