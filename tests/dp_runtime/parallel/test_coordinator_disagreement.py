"""A rank whose record differs is an error on all ranks, before any collective is entered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from dp_runtime.core.step_program import Pass, Program
from dp_runtime.parallel.agreement import Agreement, StepRecord
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.step_board import StepBoard
from dp_runtime.parallel.step_coordinator import StepCoordinator
from tests.collectives.ranks import SOON_S, Outcome, Ranks, outcome

DP_SIZE = 3
ODD_RANK = 1
PROGRAMS = (Program((Pass.TARGET,)), Program.speculative(1))


class Watched:
    """A collective that remembers which of its methods were looked up."""

    def __init__(self, collective: RowCollective) -> None:
        self._collective = collective
        self.entered: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.entered.append(name)
        return getattr(self._collective, name)


def differ(collective: RowCollective, board: StepBoard, field: str) -> tuple[Outcome, list[str]]:
    """Two steps alike, then one for which a rank differs; runs on every rank."""
    watched = Watched(collective)
    coordinator = StepCoordinator(board, watched, epoch=3, programs=PROGRAMS)

    def agree(real_rows: tuple[int, ...]) -> Agreement:
        record = StepRecord(*coordinator.step_key, real_rows)
        return coordinator.agree(board.all_gather_records(record))

    for rows in (range(DP_SIZE), (0,) * DP_SIZE):
        agreement = agree((rows[collective.dp_rank],))
        assert agreement.real_rows == (tuple(rows),)
    real_rows: tuple[int, ...] = (1,)
    if collective.dp_rank == ODD_RANK:
        match field:
            case "epoch":
                coordinator.epoch = 4
            case "step_id":
                coordinator.step_id = 9
            case "program_id":
                coordinator._program_id, real_rows = 1, (1, 1)
            case "passes":
                real_rows = (1, 1)
    return outcome(lambda: agree(real_rows)), watched.entered


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.mark.parametrize("field", ["epoch", "step_id", "program_id", "passes"])
@pytest.mark.parametrize("board", ["in_process", "shared_memory"])
def test_a_record_that_differs(ranks: Ranks, board: str, field: str) -> None:
    results = ranks.run(board, DP_SIZE, differ, field)
    for ended, entered in results:
        assert ended.error == "RankDisagreement"
        assert ended.seconds < SOON_S
        assert ended.message == results[0][0].message
        assert entered == []
    title, header, *rows = results[0][0].message.splitlines()
    assert header.split() == ["rank", "epoch", "step_id", "program_id", "real_rows"]
    assert [row.split()[0] for row in rows] == [str(rank) for rank in range(DP_SIZE)]
    usual, odd = ["3", "2", "0", "(1,)"], {
        "epoch": ["4", "2", "0", "(1,)"],
        "step_id": ["3", "9", "0", "(1,)"],
        "program_id": ["3", "2", "1", "(1,", "1)"],
        "passes": ["3", "2", "0", "(1,", "1)"],
    }[field]  # fmt: skip
    assert [row.split()[1:] for row in rows] == [
        odd if rank == ODD_RANK else usual for rank in range(DP_SIZE)
    ]
    assert ("passes" in title) == (field == "passes")
