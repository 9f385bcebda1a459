"""What a rank says before a step, and what all ranks then know alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import IntFlag

from dp_runtime.errors import RankDisagreement
from dp_runtime.program import MAX_SLOTS, Program


class FaultBits(IntFlag):
    """Why a rank can not go on with the next step."""

    NONE = 0
    STOP = 1  # asked to stop: all ranks leave the loop after this agreement


_STOP = int(FaultBits.STOP)  # plain, as the bits are in `agree`: an IntFlag's `&` is slow


@dataclass(frozen=True)
class StepRecord:
    """What one rank posts before a step: plain integers, of fixed size on the board."""

    epoch: int
    step_id: int
    program_id: int
    real_rows: tuple[int, ...]  # one count per slot of the program
    num_requests: int = 0
    free_pages: int = 0
    queued_tokens: int = 0
    wants_prefill: bool = False
    drafts_proposed: int = 0
    drafts_accepted: int = 0
    graph_vote: bool = False
    fault_bits: int = FaultBits.NONE

    def to_words(self) -> list[int]:
        """The record as RECORD_WORDS integers; unused slots are -1."""
        slots = list(self.real_rows) + [-1] * (MAX_SLOTS - len(self.real_rows))
        return [
            self.epoch, self.step_id, self.program_id, *slots, self.num_requests,
            self.free_pages, self.queued_tokens, int(self.wants_prefill), self.drafts_proposed,
            self.drafts_accepted, int(self.graph_vote), int(self.fault_bits),
        ]  # fmt: skip

    @classmethod
    def from_words(cls, words: Sequence[int]) -> StepRecord:
        """The inverse of `to_words`; the words are plain ints."""
        assert len(words) == RECORD_WORDS, f"{len(words)} words, a record has {RECORD_WORDS}"
        epoch, step_id, program_id, *rest = words
        rows = tuple([word for word in rest[:MAX_SLOTS] if word >= 0])
        requests, pages, queued, prefill, proposed, accepted, graph, faults = rest[MAX_SLOTS:]
        return cls(
            epoch, step_id, program_id, rows, requests, pages, queued, bool(prefill),
            proposed, accepted, bool(graph), faults,
        )  # fmt: skip


RECORD_WORDS = len(fields(StepRecord)) - 1 + MAX_SLOTS


@dataclass(frozen=True)
class Agreement:
    """What all ranks know alike about a step; identical on every rank.

    It is a pure function of the ranks' records. NOTE: never add a per-rank value to it.
    """

    epoch: int
    step_id: int
    program: Program
    real_rows: tuple[tuple[int, ...], ...]  # [slot][rank]
    num_requests: tuple[int, ...]  # [rank]
    queued_tokens: tuple[int, ...]  # [rank]
    any_prefill: bool
    stop: bool
    graph: bool  # every rank voted for its graph
    next_program_id: int

    @property
    def dp_size(self) -> int:
        return len(self.num_requests)

    @property
    def idle(self) -> bool:
        """No rank has a row in any slot: no forward runs."""
        return not any(any(rows) for rows in self.real_rows)


@dataclass(frozen=True)
class StepTotals:
    """Sums over all ranks, from which the next program may be chosen."""

    program_id: int
    drafts_proposed: int
    drafts_accepted: int


ProgramPolicy = Callable[[StepTotals], int]


def keep_program(totals: StepTotals) -> int:
    """The next step runs the same program."""
    return totals.program_id


def agree(
    records: Sequence[StepRecord],
    programs: Sequence[Program],
    policy: ProgramPolicy = keep_program,
) -> Agreement:
    """Fold the records of all ranks into the agreement of the step.

    Raises RankDisagreement, with a table of all ranks, if epoch, step or program differ.
    """
    first = records[0]
    if any(_identity(record) != _identity(first) for record in records):
        raise RankDisagreement(_table("ranks disagree about the step", records))
    if not 0 <= first.program_id < len(programs):
        raise RankDisagreement(_table(f"no program {first.program_id}", records))
    program = programs[first.program_id]
    if any(len(record.real_rows) != len(program.slots) for record in records):
        raise RankDisagreement(
            _table(f"the program has {len(program.slots)} slots ({program.slots})", records)
        )
    totals = StepTotals(
        first.program_id,
        sum(record.drafts_proposed for record in records),
        sum(record.drafts_accepted for record in records),
    )
    return Agreement(
        epoch=first.epoch,
        step_id=first.step_id,
        program=program,
        real_rows=tuple(zip(*(record.real_rows for record in records), strict=True)),
        num_requests=tuple(record.num_requests for record in records),
        queued_tokens=tuple(record.queued_tokens for record in records),
        any_prefill=any(record.wants_prefill for record in records),
        stop=any(int(record.fault_bits) & _STOP for record in records),
        graph=all(record.graph_vote for record in records),
        next_program_id=policy(totals),
    )


def _identity(record: StepRecord) -> tuple[int, int, int]:
    return record.epoch, record.step_id, record.program_id


def _table(title: str, records: Sequence[StepRecord]) -> str:
    lines = [f"{title}:", "rank  epoch  step_id  program_id  real_rows"]
    lines += [
        f"{rank:>4}  {r.epoch:>5}  {r.step_id:>7}  {r.program_id:>10}  {r.real_rows}"
        for rank, r in enumerate(records)
    ]
    return "\n".join(lines)
