"""What a flight record says; times are microseconds of the wall clock, 0 if not reached."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from dp_runtime.flight.recorder import Phase


class Source(StrEnum):
    ANSWER = "answer"  # the rank sent it
    MEMORY = "memory"  # read from outside, whatever the rank does
    NONE = "none"  # nothing could be read


class ProcessState(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"  # SIGSTOP, a debugger
    ENDED = "ended"
    UNKNOWN = "unknown"  # on another host


class CollectiveFlight(NamedTuple):
    number: int  # in the epoch, the same on all ranks
    kind: str
    pass_index: int
    rows: int  # of all ranks together
    row_bytes: int
    entered_us: int
    left_us: int


@dataclass(frozen=True)
class PassFlight:
    kind: str
    mode: str
    gathered_rows: int  # of all ranks together
    real_rows: tuple[int, ...]  # [position]
    begun_us: int
    ended_us: int
    first_collective: int


@dataclass(frozen=True)
class StepFlight:
    """One step of one rank: its record, what all agreed on, and when each phase was reached."""

    epoch: int
    step_id: int
    begun_us: int
    posted_us: int
    agreed_us: int
    sampled_us: int  # when sampling began
    committing_us: int
    committed_us: int
    record_key: tuple[int, ...]  # epoch, step, program and number of passes: equal on all ranks
    rows: tuple[int, ...]  # of this rank, [pass]
    queued_tokens: int
    drafts_proposed: int
    drafts_accepted: int
    graph_votes: int
    fault_bits: int
    waited_us: int  # for other ranks, in the step before
    prefill_rows: int
    num_sampling: int  # requests that get a token
    step_us: int  # how long an earlier step took, where max_step_ms is set
    outcome: str
    next_program_id: int
    passes: tuple[PassFlight, ...]
    collectives: tuple[CollectiveFlight, ...]

    @property
    def key(self) -> tuple[int, int]:
        return self.epoch, self.step_id

    @property
    def idle(self) -> bool:
        return self.outcome in ("idle", "stop")


@dataclass(frozen=True)
class RankFlight:
    dp_rank: int
    source: Source
    process: ProcessState = ProcessState.UNKNOWN
    silent_s: float = 0.0  # since it last answered the driver
    host: str = ""
    pid: int = 0
    clock_offset_us: int = 0  # the wall clock minus the host's monotonic one
    epoch: int = 0
    transport: str = ""
    phase: str = Phase.STARTING.name.lower()
    phase_step: int = -1
    phase_pass: int = 0
    since_us: int = 0
    error: str = ""
    error_us: int = 0
    steps: tuple[StepFlight, ...] = ()  # in their order

    @property
    def last_posted(self) -> StepFlight | None:
        return next((step for step in reversed(self.steps) if step.posted_us), None)

    @property
    def last_collective(self) -> CollectiveFlight | None:
        for step in reversed(self.steps):
            if step.epoch == self.epoch and step.collectives:
                return step.collectives[-1]
        return None


@dataclass(frozen=True)
class FlightDump:
    reason: str  # why it was taken
    taken_us: int
    ranks: tuple[RankFlight, ...]  # [position]
