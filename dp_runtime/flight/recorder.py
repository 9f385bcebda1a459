"""FlightRecorder: notes each event of a rank's steps, in about a microsecond."""

from __future__ import annotations

import re
import traceback
from enum import IntEnum
from pathlib import Path
from time import perf_counter_ns

from dp_runtime import errors
from dp_runtime.core.step_program import Pass
from dp_runtime.flight.ring import (
    BEGUN,
    COLLECTIVE,
    COMMITTED_AT,
    COMMITTING_AT,
    EPOCH,
    EPOCH_AT,
    ERROR,
    ERROR_AT,
    LEFT_AT,
    MARK,
    NOW,
    NOW_AT,
    NUM_STEPS,
    PASS_TIMES,
    PASSES_AT,
    POSTED,
    POSTED_AT,
    SAMPLED_AT,
    FlightRing,
    RingLayout,
)
from dp_runtime.parallel.agreement import Agreement, StepRecord
from dp_runtime.parallel.execution_plan import ExecutionMode

PROTOCOL_ERRORS = (errors.RankDisagreement, errors.CollectiveAborted, errors.CollectiveTimeout)
PROTOCOL_NAMES = tuple(error.__name__ for error in PROTOCOL_ERRORS)
_FOREIGN_TEXT = re.compile(rf"(rank \d+: (?!{'|'.join(PROTOCOL_NAMES)})\w+: ).*")
HOME, PACKAGES = Path(errors.__file__).parents[1], ("dp_runtime", "workers", "collectives")
PASS_CODES = {pass_kind: code for code, pass_kind in enumerate(Pass)}
MODE_CODES = {mode: code for code, mode in enumerate(ExecutionMode)}


class Phase(IntEnum):
    STARTING = 0
    SCHEDULE = 1
    AGREE = 2
    PASS = 3
    SAMPLE = 4
    COMMIT = 5  # on a GPU, the wait for its results too
    IDLE = 6
    ENDED = 7  # all ranks agreed to stop
    CAPTURE = 8  # of CUDA graphs, between two steps


class Kind(IntEnum):
    ALL_GATHER = 1
    REDUCE_SCATTER = 2


class Outcome(IntEnum):
    PENDING = 0
    RUN = 1
    IDLE = 2
    STOP = 3


SCHEDULE, AGREE, PASS, SAMPLE, COMMIT, IDLE = map(int, list(Phase)[1:7])  # an IntEnum packs slowly
RUN = int(Outcome.RUN)


class FlightRecorder:
    """Writes a rank's ring; only the thread that steps may call it, but for `snapshot`."""

    def __init__(self, ring: FlightRing) -> None:
        self.ring = ring
        layout = ring.layout
        self._memory, self._layout = ring.memory, layout
        self._blank = bytes(layout.step_bytes)
        self._agreed = [layout.agreed(num) for num in range(layout.max_passes + 1)]
        self._epoch = 0
        self._first_turn = self._turn = 1
        self._step_at = layout.step(1)
        self._pass = 0
        self._num_collectives = self._first_number = 0
        self._collective_at = 0

    @classmethod
    def in_process(cls, dp_rank: int, layout: RingLayout) -> FlightRecorder:
        return cls(FlightRing.in_process(layout, dp_rank))

    def join(self, epoch: int, transport: str) -> None:
        """Begin an epoch, in which all ranks count steps and collectives from 0."""
        self._epoch = epoch
        self._first_turn = self._turn + 1
        self._first_number = self._num_collectives
        self.ring.set_clock()
        EPOCH.pack_into(self._memory, EPOCH_AT, epoch, transport.encode())
        ERROR.pack_into(self._memory, ERROR_AT, 0, b"")

    def schedule(self, step_id: int) -> None:
        now = perf_counter_ns()
        turn = self._turn = self._first_turn + step_id
        at = self._step_at = self._layout.step(turn)
        self._memory[at : at + len(self._blank)] = self._blank
        BEGUN.pack_into(self._memory, at, turn, self._epoch, step_id, now)
        NOW.pack_into(self._memory, NOW_AT, SCHEDULE, turn, 0, now)
        if turn % NUM_STEPS == 0:
            self.ring.set_clock()  # it drifts, and is set

    def post(self, record: StepRecord) -> None:
        now = perf_counter_ns()
        POSTED.pack_into(self._memory, self._step_at + POSTED_AT, *record.to_words(), now)
        NOW.pack_into(self._memory, NOW_AT, AGREE, self._turn, 0, now)

    def agree(self, agreement: Agreement) -> None:
        now, plans = perf_counter_ns(), agreement.plans
        outcome = Outcome.STOP if agreement.stop else Outcome.IDLE if agreement.idle else RUN
        words = [now, outcome, agreement.next_program_id, len(plans)]
        for pass_kind, (mode, _, padding, _) in zip(agreement.program.passes, plans):
            words += (PASS_CODES[pass_kind], MODE_CODES[mode], padding.total_gathered)
            words += padding.real_rows
        at = self._step_at + self._layout.agreed_at
        self._agreed[len(plans)].pack_into(self._memory, at, *words)
        if outcome is Outcome.STOP:
            NOW.pack_into(self._memory, NOW_AT, Phase.ENDED, self._turn, 0, now)

    def begin_pass(self, index: int) -> None:
        now, number = perf_counter_ns(), self._num_collectives - self._first_number
        self._pass = index
        at = self._step_at + PASSES_AT + index * PASS_TIMES.size
        PASS_TIMES.pack_into(self._memory, at, now, 0, number)
        NOW.pack_into(self._memory, NOW_AT, PASS, self._turn, index, now)

    def end_pass(self) -> None:
        at = self._step_at + PASSES_AT + self._pass * PASS_TIMES.size + MARK.size
        MARK.pack_into(self._memory, at, perf_counter_ns())

    def enter(self, kind: int, rows: int, row_bytes: int) -> None:
        """Note a collective before its call: rows of all ranks together, as each rank counts."""
        number = self._num_collectives
        self._num_collectives = number + 1
        at = self._collective_at = self._layout.collective(number)
        COLLECTIVE.pack_into(
            self._memory, at, self._turn, number - self._first_number, kind, self._pass,
            rows, row_bytes, perf_counter_ns(), 0,
        )  # fmt: skip

    def leave(self) -> None:
        MARK.pack_into(self._memory, self._collective_at + LEFT_AT, perf_counter_ns())

    def sample(self) -> None:
        now = perf_counter_ns()
        MARK.pack_into(self._memory, self._step_at + SAMPLED_AT, now)
        NOW.pack_into(self._memory, NOW_AT, SAMPLE, self._turn, 0, now)

    def commit(self, step_id: int) -> None:
        """Note the commit of a step, which may be the one before the newest."""
        now, turn = perf_counter_ns(), self._first_turn + step_id
        MARK.pack_into(self._memory, self._layout.step(turn) + COMMITTING_AT, now)
        NOW.pack_into(self._memory, NOW_AT, COMMIT, turn, 0, now)

    def committed(self, step_id: int) -> None:
        at = self._layout.step(self._first_turn + step_id) + COMMITTED_AT
        MARK.pack_into(self._memory, at, perf_counter_ns())

    def capture(self) -> None:
        NOW.pack_into(self._memory, NOW_AT, Phase.CAPTURE, self._turn, 0, perf_counter_ns())

    def rest(self) -> None:
        NOW.pack_into(self._memory, NOW_AT, IDLE, self._turn, 0, perf_counter_ns())

    def fail(self, error: BaseException) -> None:
        """Note why this rank left its step; where it was then stays to be seen."""
        ERROR.pack_into(self._memory, ERROR_AT, perf_counter_ns(), describe(error).encode())

    def snapshot(self) -> bytes:
        return self.ring.snapshot()


def describe(error: BaseException) -> str:
    """Name an error and its place; its text, which may quote a request, only if it is ours."""
    kind = type(error).__name__
    if isinstance(error, PROTOCOL_ERRORS):
        return f"{kind}: {without_foreign_text(str(error))}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if path.is_relative_to(HOME) and path.relative_to(HOME).parts[0] in PACKAGES:
            return f"{kind} at {path.relative_to(HOME)}:{frame.lineno}"
    return kind


def without_foreign_text(reason: str) -> str:
    """Cut what an exception that is not ours said, in a reason that names a rank and its type."""
    return _FOREIGN_TEXT.sub(r"\1...", reason)
