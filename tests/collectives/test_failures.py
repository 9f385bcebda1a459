"""Waits that can not end well: timeouts, aborts, stopped and killed peers."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from collectives.in_process import InProcessGroup
from collectives.shared_memory.group import SharedMemoryGroup
from dp_runtime.core.membership import Membership
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout
from dp_runtime.parallel.collective import RowCollective
from tests.collectives import failing
from tests.collectives.ranks import KINDS, PROCESS_KINDS, SOON_S, Outcome, Ranks
from tests.workers.leftovers import shared_memory_names

WAITS = ("gather", "uneven gather", "reduce_scatter", "barrier", "board", "idle")


def pairwise(kinds: Sequence[str], waits: Sequence[str], others: tuple[Any, Any]) -> list[Any]:
    """All combinations; those that add no new pair of values are slow."""
    return [
        pytest.param(kind, where, other, marks=pytest.mark.slow if (i + j + k) % 2 else [])
        for i, kind in enumerate(kinds)
        for j, where in enumerate(waits)
        for k, other in enumerate(others)
    ]


NAMES_THE_RANK = ("in_process", "shared_memory")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("where", ["gather", "uneven gather", "reduce_scatter", "board"])
def test_a_rank_that_does_not_come(ranks: Ranks, kind: str, where: str, tmp_path: Path) -> None:
    outcomes = ranks.run(kind, 3, failing.missing_rank_case, where, tmp_path, timeout_s=0.3)
    for first, again in outcomes[:-1]:
        assert first.error == "CollectiveTimeout"
        assert 0.25 < first.seconds < SOON_S
        assert "0.3 s" in first.message
        assert ("ranks 2" in first.message) == (kind in NAMES_THE_RANK)
        assert again.error == "CollectiveAborted"
        assert "timed out" in again.message


def assert_freed(outcomes: list[tuple[float, Outcome, Outcome]]) -> None:
    """Everyone left because of the abort, knowing its reason; not at the end of a timeout."""
    aborted_at = max(at for at, _, _ in outcomes)
    for _, ended, after in outcomes:
        assert ended.error == after.error == "CollectiveAborted", (ended, after)
        assert "rank is lost" in ended.message
        assert ended.ended_at - aborted_at < SOON_S


def assert_late(outcomes: tuple[Outcome, Outcome]) -> None:
    """A rank that comes after the abort is not held up.

    Its first call may still find all that the peers had sent before; its next one raises.
    """
    assert outcomes[0].error in ("", "CollectiveAborted")
    assert outcomes[1].error == "CollectiveAborted"
    assert max(each.seconds for each in outcomes) < SOON_S


@pytest.mark.parametrize(("kind", "where", "by_board"), pairwise(KINDS, WAITS, (False, True)))
def test_abort_frees_every_waiter(
    ranks: Ranks, kind: str, where: str, by_board: bool, tmp_path: Path
) -> None:
    outcomes = ranks.run(kind, 4, failing.abort_case, where, 3, "late", by_board, tmp_path)
    assert_freed(outcomes[:3])
    assert_late(outcomes[3][1:])


# Gloo hears of an abort in whatever it waits in alike, a second after it where a peer is stopped.
STOPPED = [
    *pairwise(PROCESS_KINDS[:1], WAITS, (0, 3)),
    *pairwise(PROCESS_KINDS[1:], ("gather", "board"), (3, 0)),
    *(
        pytest.param("torch_distributed", where, lost, marks=pytest.mark.slow)
        for where in ("uneven gather", "reduce_scatter", "barrier", "idle")
        for lost in (0, 3)
    ),
]


@pytest.mark.parametrize(("kind", "where", "lost"), STOPPED)
def test_abort_with_a_stopped_peer(
    ranks: Ranks, kind: str, where: str, lost: int, tmp_path: Path
) -> None:
    ranks.start(kind, 4, failing.abort_case, where, lost, "stopped", False, tmp_path)
    try:
        assert_freed([ranks.result(rank) for rank in range(4) if rank != lost])
    finally:
        os.kill(ranks.pid(lost), signal.SIGCONT)
    assert_late(ranks.result(lost)[1:])


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = shared_memory_names()
    yield
    assert shared_memory_names() <= before


@pytest.mark.parametrize("kind", PROCESS_KINDS)
@pytest.mark.parametrize(("where", "lost"), [("gather", 3), ("board", 0)])
@pytest.mark.usefixtures("nothing_left")
def test_abort_by_a_survivor_of_a_killed_peer(
    ranks: Ranks, kind: str, where: str, lost: int, tmp_path: Path
) -> None:
    ranks.start(kind, 4, failing.abort_case, where, lost, "killed", False, tmp_path)
    assert_freed([ranks.result(rank) for rank in range(4) if rank != lost])
    with pytest.raises(EOFError):
        ranks.result(lost)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dp_size", [1, 3])
@pytest.mark.parametrize("ending", ["close", "abort"])
def test_use_after_the_end(ranks: Ranks, kind: str, dp_size: int, ending: str) -> None:
    for ended in ranks.run(kind, dp_size, failing.use_after_case, ending):
        assert {each.error for each in ended.values()} == {"CollectiveAborted"}
        assert max(each.seconds for each in ended.values()) < SOON_S
        reasons = {each.message for each in ended.values()}
        assert (
            reasons
            == {
                "close": {"this rank has closed its group"},
                "abort": {"aborted by rank 0: for a test"},
            }[ending]
        )


@pytest.mark.parametrize("kind", KINDS)
def test_closing_frees_the_own_waiter(ranks: Ranks, kind: str, tmp_path: Path) -> None:
    ended = ranks.run(kind, 2, failing.close_case, tmp_path)[0]
    assert ended.error == "CollectiveAborted"
    assert ended.seconds < SOON_S


@pytest.mark.parametrize("transport", ["in_process", "shared_memory"])
def test_texts_call_ranks_by_their_names(tmp_path: Path, transport: str) -> None:
    members, path = Membership((2, 7)), str(tmp_path / "meet")
    threads = InProcessGroup(2, 0.2, members)

    def texts(position: int) -> list[str]:
        collective: RowCollective
        close: Callable[[], None]
        if transport == "in_process":
            collective, close = threads.collective(position), lambda: None
        else:
            group = SharedMemoryGroup(path, position, 2, 0.2, members=members)
            collective, close = group.collective, group.close
        collective.barrier()
        if position == 1:
            return []
        with pytest.raises(CollectiveTimeout) as late:
            collective.barrier()
        collective.abort("for a test")
        with pytest.raises(CollectiveAborted) as aborted:
            collective.raise_if_failed()
        close()
        return [str(late.value), str(aborted.value)]

    with ThreadPoolExecutor(2) as pool:
        (late, aborted), _ = pool.map(texts, range(2))
    assert late == "barrier: waited 0.2 s for ranks 7"
    assert "ranks 7" in aborted or aborted == "aborted by rank 2: for a test"
