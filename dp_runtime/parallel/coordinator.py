"""StepCoordinator: brings the ranks to one agreement per step; alone in knowing gathered rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import torch

from dp_runtime.core.program import SERVING_PROGRAMS, Pass, Program
from dp_runtime.parallel.agreement import (
    Agreement,
    FaultBits,
    ProgramPolicy,
    StepRecord,
    agree,
    keep_program,
)
from dp_runtime.parallel.buckets import GraphBuckets, StageBuckets
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.exchange import PaddedExchange, RowExchange, graph_plan
from dp_runtime.parallel.padding import PaddingCost, PaddingMode, PaddingPlan
from dp_runtime.parallel.step_board import StepBoard


@dataclass(frozen=True)
class RankStats:
    """What a rank tells the others about itself besides its rows."""

    num_requests: int = 0
    free_pages: int = 0
    queued_tokens: int = 0
    wants_prefill: bool = False
    graph_votes: int = 0  # bit n: its rows of pass n fit a captured graph
    drafts_proposed: int = 0  # in steps committed since its last record
    drafts_accepted: int = 0


@dataclass(frozen=True)
class Padding:
    """How the MoE collectives are padded; `cost` decides where the mode is `auto`."""

    mode: PaddingMode = PaddingMode.MAX_LEN
    cost: PaddingCost | None = None
    poison: bool = False

    def plan(self, dp_rank: int, real_rows: tuple[int, ...]) -> PaddingPlan:
        """Rows of every rank in one MoE stage."""
        mode = self.mode
        if mode is PaddingMode.AUTO:
            assert self.cost is not None, "padding auto needs the cost measured at start"
            mode = self.cost.choose(real_rows)
        return PaddingPlan.of(mode, dp_rank, real_rows)


class StepCoordinator:
    """Posts this rank's record, agrees with the others, and plans the MoE exchange of a pass."""

    def __init__(
        self,
        board: StepBoard,
        collective: RowCollective,
        padding: Padding,
        *,
        epoch: int = 0,
        programs: Sequence[Program] = SERVING_PROGRAMS,
        policy: ProgramPolicy = keep_program,
    ) -> None:
        self.board = board
        self.collective = collective
        self.padding = padding
        self.epoch = epoch
        self.buckets: Mapping[tuple[Pass, int], GraphBuckets] = {}  # of graphs, by query length
        self.stages: StageBuckets | None = None  # of MoE stages that are captured alone
        self.step_id = 0  # of the next step
        self.programs = programs
        self._policy = policy
        self._program_id = 0  # the first program is part of the epoch

    @property
    def program(self) -> Program:
        """The program of the next step, which the last agreement chose."""
        return self.programs[self._program_id]

    def agree(
        self, real_rows: tuple[int, ...], load: RankStats, faults: FaultBits = FaultBits.NONE
    ) -> Agreement:
        """Post this rank's rows per pass and return what all ranks agree on.

        Raises RankDisagreement before any collective of the step is entered.
        """
        record = StepRecord(
            epoch=self.epoch,
            step_id=self.step_id,
            program_id=self._program_id,
            real_rows=real_rows,
            num_requests=load.num_requests,
            free_pages=load.free_pages,
            queued_tokens=load.queued_tokens,
            wants_prefill=load.wants_prefill,
            drafts_proposed=load.drafts_proposed,
            drafts_accepted=load.drafts_accepted,
            graph_votes=load.graph_votes,
            fault_bits=faults,
        )
        agreement = agree(self.board.all_gather_records(record), self.programs, self._policy)
        self.step_id += 1
        self._program_id = agreement.next_program_id
        return agreement

    def exchange(self, agreement: Agreement, index: int) -> RowExchange:
        """How the rows of the program's pass number `index` travel in its MoE stages."""
        rank, real_rows = self.collective.dp_rank, agreement.real_rows[index]
        if agreement.graphs[index]:
            pass_kind = agreement.program.passes[index]
            buckets = self.buckets[pass_kind, agreement.program.query_len(pass_kind)]
            plan = graph_plan(self.collective, real_rows, buckets.gathered(max(real_rows)))
        elif self.stages is not None and (bucket := self.stages.gathered(max(real_rows))):
            plan = graph_plan(self.collective, real_rows, bucket)
        else:
            plan = self.padding.plan(rank, real_rows)
        return PaddedExchange(plan, self.collective, self.padding.poison)

    def abort(self, reason: str) -> None:
        """Free every rank that waits for this one."""
        self.board.abort(reason)
        self.collective.abort(reason)


PROBE_ROWS = (16, 256)
PROBE_ROUNDS = 5


def measure_padding_cost(
    collective: RowCollective, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> PaddingCost:
    """Time even and uneven exchanges of two sizes; the slowest rank's figures count everywhere."""
    size = collective.dp_size
    even = [_time(collective, (rows,) * size, hidden_size, dtype, device) for rows in PROBE_ROWS]
    # One rank has a row more, the last as many less: the same bytes, but uneven.
    uneven = [
        _time(collective, (rows + 1, *(rows,) * (size - 2), rows - 1), hidden_size, dtype, device)
        if size > 1
        else times
        for rows, times in zip(PROBE_ROWS, even, strict=True)
    ]
    worst = [
        max(times) for times in zip(*collective.all_gather_ints([*even, *uneven]), strict=True)
    ]
    span = (PROBE_ROWS[1] - PROBE_ROWS[0]) * size
    even_slope = max(0, worst[1] - worst[0]) // span
    uneven_slope = max(0, worst[3] - worst[2]) // span
    return PaddingCost(
        max_len_base=worst[0] - even_slope * PROBE_ROWS[0] * size,
        max_len_per_row=even_slope,
        ragged_base=worst[2] - uneven_slope * PROBE_ROWS[0] * size,
        ragged_per_row=uneven_slope,
    )


def _time(
    collective: RowCollective,
    counts: tuple[int, ...],
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Median nanoseconds of a gather and a reduce-scatter with these counts."""
    rows = torch.zeros((counts[collective.dp_rank], hidden_size), dtype=dtype, device=device)
    times = []
    for _ in range(PROBE_ROUNDS):
        collective.barrier()
        start = perf_counter_ns()
        collective.reduce_scatter(collective.all_gather(rows, counts), counts).sum().item()
        times.append(perf_counter_ns() - start)
    return sorted(times)[PROBE_ROUNDS // 2]
