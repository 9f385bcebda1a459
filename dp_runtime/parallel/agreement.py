"""The records that ranks post before a step, and the agreement that follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntFlag
from functools import reduce
from operator import and_
from typing import NamedTuple

from dp_runtime.core.step_program import MAX_PASSES, Pass, Program
from dp_runtime.errors import RankDisagreement
from dp_runtime.parallel.execution_plan import ExecutionMode, ExecutionPlan, ExecutionPolicy
from dp_runtime.parallel.prefill_budget import BudgetPolicy, StepLoad, no_budget


class FaultBits(IntFlag):
    NONE = 0
    STOP = 1  # asked to stop: all ranks leave the loop after this agreement


_STOP = int(FaultBits.STOP)  # plain: an IntFlag's `&` is slow


class StepRecord(NamedTuple):
    """Holds what a rank posts before a step; a tuple, since each step makes and reads several."""

    epoch: int
    step_id: int
    program_id: int
    real_rows: tuple[int, ...]  # one count per pass of the program
    queued_tokens: int = 0
    drafts_proposed: int = 0  # in steps committed since the last record
    drafts_accepted: int = 0
    graph_votes: int = 0  # bit n: this rank's rows of pass n fit a captured graph
    fault_bits: int = 0  # FaultBits
    waited_us: int = 0  # for slower ranks, in the step before this one
    prefill_rows: int = 0  # of the target pass, and tokens of images that are encoded before it
    num_sampling: int = 0  # requests that get a token from this step
    step_us: int = 0  # how long an earlier step took: see StepLoad
    replays_routing: int = 0  # 1: rows of the target pass bring their experts

    def to_words(self) -> tuple[int, ...]:  # [RECORD_WORDS]; rows take MAX_PASSES places
        rows = self.real_rows
        unused = _UNUSED[len(rows) :]
        return (*self[:3], len(rows), *rows, *unused, *self[4:])

    @classmethod
    def from_words(cls, words: Sequence[int]) -> StepRecord:
        assert len(words) == RECORD_WORDS, f"{len(words)} words, a record has {RECORD_WORDS}"
        rows = tuple(words[4 : 4 + words[3]])
        return cls._make((*words[:3], rows, *words[4 + MAX_PASSES :]))


_UNUSED = (0,) * MAX_PASSES
RECORD_WORDS = len(StepRecord._fields) + MAX_PASSES


class Agreement(NamedTuple):
    """Identical on all ranks: a pure function of their records. NOTE: add no per-rank value."""

    epoch: int
    step_id: int
    program: Program
    plans: tuple[ExecutionPlan, ...]  # [pass]
    queued_tokens: tuple[int, ...]  # [rank]
    stop: bool
    next_program_id: int
    slowest: int  # position of the rank that was, in the step before this one: it waited least
    next_prefill_budget: int | None  # prompt tokens of each rank in the next step; None: no limit

    @property
    def real_rows(self) -> tuple[tuple[int, ...], ...]:  # [pass][rank]
        return tuple(plan.padding.real_rows for plan in self.plans)

    @property
    def dp_size(self) -> int:
        return len(self.queued_tokens)

    @property
    def idle(self) -> bool:
        return all(plan.mode is ExecutionMode.EMPTY for plan in self.plans)


class StepTotals(NamedTuple):  # over all ranks
    program_id: int
    drafts_proposed: int
    drafts_accepted: int


EAGER = ExecutionPolicy()

ProgramPolicy = Callable[[StepTotals], int]


def keep_program(totals: StepTotals) -> int:
    return totals.program_id


def agree(
    records: Sequence[StepRecord],
    programs: Sequence[Program],
    policy: ProgramPolicy = keep_program,
    execution: ExecutionPolicy = EAGER,
    dp_ranks: Sequence[int] = (),
    budget: BudgetPolicy = no_budget,
) -> Agreement:
    """Fold all ranks' records; RankDisagreement, with a table, if steps or programs differ.

    dp_ranks: what the ranks of the records are called, if not by their positions.
    """
    size = len(records)
    names = dp_ranks or range(size)
    columns = zip(*records, strict=True)
    epochs, steps, ids, rows, queued, proposed, accepted, votes, faults, waits, *load = columns
    prefill_rows, num_sampling, step_us, replays = load
    epoch, step_id, program_id = epochs[0], steps[0], ids[0]
    if not epochs.count(epoch) == steps.count(step_id) == ids.count(program_id) == size:
        raise RankDisagreement(_table("ranks disagree about the step", records, names))
    if not 0 <= program_id < len(programs):
        raise RankDisagreement(_table(f"no program {program_id}", records, names))
    program = programs[program_id]
    num_passes = len(program.passes)
    if any(len(counts) != num_passes for counts in rows):
        raise RankDisagreement(
            _table(f"the program has {num_passes} passes ({program.passes})", records, names)
        )
    all_fit_graphs = reduce(and_, votes)
    plans = tuple(
        execution.plan(
            pass_kind, program.query_len(pass_kind), counts, all_fit_graphs >> n & 1 == 1
        )
        for n, (pass_kind, counts) in enumerate(zip(program.passes, zip(*rows, strict=True)))
    )
    return Agreement(
        epoch=epoch,
        step_id=step_id,
        program=program,
        plans=_replaying(plans, program) if any(replays) else plans,
        queued_tokens=queued,
        stop=any(bits & _STOP for bits in faults),
        next_program_id=policy(StepTotals(program_id, sum(proposed), sum(accepted))),
        slowest=waits.index(min(waits)),
        next_prefill_budget=budget(StepLoad(max(prefill_rows), sum(num_sampling), max(step_us))),
    )


def _replaying(plans: Sequence[ExecutionPlan], program: Program) -> tuple[ExecutionPlan, ...]:
    return tuple(
        plan._replace(replays_routing=pass_kind is Pass.TARGET)
        for pass_kind, plan in zip(program.passes, plans)
    )


def _table(title: str, records: Sequence[StepRecord], names: Sequence[int]) -> str:
    lines = [f"{title}:", "rank  epoch  step_id  program_id  real_rows"]
    lines += [
        f"{rank:>4}  {r.epoch:>5}  {r.step_id:>7}  {r.program_id:>10}  {r.real_rows}"
        for rank, r in zip(names, records)
    ]
    return "\n".join(lines)
