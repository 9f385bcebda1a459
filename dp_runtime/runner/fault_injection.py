"""Has faults happen in a rank's steps, for tests and for experiments with recovery."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from time import monotonic, sleep

import torch

from dp_runtime.core.batch import SamplePositions
from dp_runtime.core.faults import Fault, FaultKind
from dp_runtime.parallel.agreement import Agreement, StepRecord
from dp_runtime.parallel.step_board import StepBoard
from dp_runtime.runner.step_loop import StepLoop
from dp_runtime.runner.step_runner import StepOutput
from dp_runtime.sampling.draft_verification import Verification
from dp_runtime.sampling.row_logits import RowLogits
from dp_runtime.sampling.sampler import Sampled
from dp_runtime.sampling.token_masks import NO_GRAMMARS, GrammarMasks
from dp_runtime.scheduler.scheduler_output import SchedulerOutput


class DueFaults:
    """One rank's faults of one epoch, each until it has happened."""

    def __init__(self, faults: Iterable[Fault], dp_rank: int, epoch: int) -> None:
        self._faults = [one for one in faults if (one.dp_rank, one.epoch) == (dp_rank, epoch)]

    def __bool__(self) -> bool:
        return bool(self._faults)

    def take(self, step_id: int, *kinds: FaultKind, elapsed_s: float = 0.0) -> list[Fault]:
        """Return those of some kinds that happen in this step; what is over is taken out."""
        self._faults = [one for one in self._faults if not one.is_over(step_id, elapsed_s)]
        due = [one for one in self._faults if one.kind in kinds and one.is_due(step_id, elapsed_s)]
        for one in due:
            if not one.lasts:
                self._faults.remove(one)
        return due


class FaultyLaunch:
    """Launches a loop's steps, once the ranks have agreed: the others wait in a collective."""

    def __init__(self, loop: StepLoop, due: DueFaults) -> None:
        self._launch, self._sample, self._due = loop.launch, loop.runner.sample, due
        self._step_id = 0
        self._began_s: float | None = None  # time.monotonic(), when a step first had rows
        loop.launch, loop.runner.sample = self.launch, self.sample

    def launch(
        self, scheduled: SchedulerOutput, agreement: Agreement, graph_votes: int
    ) -> StepOutput:
        self._step_id = agreement.step_id
        if self._began_s is None and not agreement.idle:
            self._began_s = monotonic()
        kinds = [FaultKind.KILL, FaultKind.STOP, FaultKind.RAISE, FaultKind.SLOW]
        if len(scheduled.chunks) == 1:
            kinds.append(FaultKind.OOM)
        for fault in self._due.take(self._step_id, *kinds, elapsed_s=self._elapsed_s):
            _happen(fault)
        return self._launch(scheduled, agreement, graph_votes)

    @property
    def _elapsed_s(self) -> float:
        return 0.0 if self._began_s is None else monotonic() - self._began_s

    def sample(
        self,
        logits: RowLogits,
        rows: SamplePositions,
        verification: Verification | None = None,
        grammars: GrammarMasks = NO_GRAMMARS,
    ) -> Sampled:
        if len(rows) and self._due.take(self._step_id, FaultKind.NAN, elapsed_s=self._elapsed_s):
            values = logits.values.clone()
            values[0] = torch.nan
            logits = RowLogits.from_logits(values)
        return self._sample(logits, rows, verification, grammars)


class FaultyBoard:
    """A step board that posts and hears, now and then, what it should not."""

    def __init__(self, board: StepBoard, due: DueFaults) -> None:
        self._board, self._due = board, due
        self._step_id = 0
        self.dp_rank, self.dp_size = board.dp_rank, board.dp_size
        self.idle: Callable[[float], None] = board.idle
        self.abort: Callable[[str], None] = board.abort
        self.close: Callable[[], None] = board.close

    @property
    def waited_s(self) -> float:
        return self._board.waited_s

    def all_gather_records(self, record: StepRecord) -> tuple[StepRecord, ...]:
        self._step_id = record.step_id
        if self._due.take(record.step_id, FaultKind.MISMATCH):
            record = record._replace(program_id=record.program_id + 1)
        return self._board.all_gather_records(record)

    def wake(self) -> None:
        if not self._due.take(self._step_id, FaultKind.DROP_WAKEUP):
            self._board.wake()


def _happen(fault: Fault) -> None:
    where = f"at step {fault.step} of rank {fault.dp_rank}, as inject says"
    match fault.kind:
        case FaultKind.KILL:
            os.kill(os.getpid(), signal.SIGKILL)
        case FaultKind.STOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case FaultKind.SLOW:
            sleep(fault.seconds)
        case FaultKind.RAISE:
            raise RuntimeError(f"a fault {where}")
        case FaultKind.OOM:
            raise torch.OutOfMemoryError(f"no memory {where}")
