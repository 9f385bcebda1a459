"""The same assertions on the step board, over all implementations."""

from __future__ import annotations

import pytest

from tests.collectives import boards
from tests.collectives.ranks import KINDS, SOON_S, Ranks

WAKES = ("in_process", "shared_memory")  # a torch.distributed board naps for milliseconds instead

pytestmark = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_everyone_reads_what_everyone_posted(ranks: Ranks, kind: str, dp_size: int) -> None:
    ranks.run(kind, dp_size, boards.exchange_case, 100)


@pytest.mark.parametrize("field", ["epoch", "step_id", "program_id"])
def test_records_that_differ_still_meet(ranks: Ranks, kind: str, field: str) -> None:
    results = ranks.run(kind, 3, boards.disagreement_case, field)
    tables = {table for table, _ in results}
    assert len(tables) == 1
    assert "ranks disagree" in tables.pop()
    assert max(seconds for _, seconds in results) < SOON_S


def test_the_board_does_not_disturb_the_rows(ranks: Ranks, kind: str) -> None:
    ranks.run(kind, 3, boards.interleaved_case)


@pytest.mark.parametrize("how", ["timeout", "wake", "woken before", "post"])
def test_idle_ends(ranks: Ranks, kind: str, how: str) -> None:
    first, second = ranks.run(kind, 2, boards.idle_case, how)
    assert first.seconds < SOON_S / 2, "it would sleep for 10 s by itself"
    if kind not in WAKES:
        return
    match how:
        case "timeout":
            assert first.seconds >= 0.15
        case "wake":
            assert first.woke_at >= first.caused_at > 0
        case "post":
            assert first.woke_at >= second.caused_at > 0


def test_idling_leaves_the_processor_to_others(ranks: Ranks, kind: str) -> None:
    assert max(ranks.run(kind, 2, boards.doze_case)) < 0.15
