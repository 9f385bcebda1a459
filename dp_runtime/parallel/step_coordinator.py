"""StepCoordinator: brings the ranks to one agreement per step."""

from __future__ import annotations

from collections.abc import Sequence

from dp_runtime.core.membership import Membership
from dp_runtime.core.step_program import SERVING_PROGRAMS, Program
from dp_runtime.parallel.agreement import (
    EAGER,
    Agreement,
    ProgramPolicy,
    StepRecord,
    agree,
    keep_program,
)
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.execution_plan import ExecutionPolicy
from dp_runtime.parallel.prefill_budget import BudgetPolicy, no_budget
from dp_runtime.parallel.step_board import StepBoard


class StepCoordinator:
    """Counts an epoch's steps, and folds the ranks' records by policies that all ranks share."""

    def __init__(
        self,
        board: StepBoard,
        collective: RowCollective,
        execution: ExecutionPolicy = EAGER,
        *,
        epoch: int = 0,
        members: Membership | None = None,
        programs: Sequence[Program] = SERVING_PROGRAMS,
        policy: ProgramPolicy = keep_program,
        budget: BudgetPolicy = no_budget,
    ) -> None:
        self.board = board
        self.collective = collective
        self.epoch = epoch
        self.members = members or Membership.first(board.dp_size)
        self.step_id = 0  # of the next step
        self.programs = programs
        self._execution = execution
        self.policy = policy
        self.budget = budget
        self._program_id = 0  # the first program is part of the epoch
        self.prefill_budget: int | None = None  # of the next step

    @property
    def execution(self) -> ExecutionPolicy:
        return self._execution

    @property
    def limits_prefill(self) -> bool:
        """Tell whether agreements need the times of steps."""
        return self.budget is not no_budget

    def execute_by(self, execution: ExecutionPolicy) -> None:
        """Plan passes by this policy from the next step on; an event of all ranks at once."""
        self._execution = execution

    @property
    def dp_rank(self) -> int:
        return self.members.dp_ranks[self.collective.dp_rank]

    @property
    def program(self) -> Program:
        return self.programs[self._program_id]

    @property
    def step_key(self) -> tuple[int, int, int]:
        """Return the first fields of the next record; all ranks must have the same."""
        return self.epoch, self.step_id, self._program_id

    def agree(self, records: Sequence[StepRecord]) -> Agreement:
        """Fold the next step's records; RankDisagreement comes before any of its collectives."""
        agreement = agree(
            records, self.programs, self.policy, self._execution, self.members.dp_ranks, self.budget
        )
        self.step_id += 1
        self._program_id = agreement.next_program_id
        self.prefill_budget = agreement.next_prefill_budget
        return agreement

    def abort(self, reason: str) -> None:
        self.board.abort(reason)
        self.collective.abort(reason)
