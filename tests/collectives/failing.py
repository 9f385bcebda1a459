"""What ranks do in the tests of failures; each function runs on every rank of a group."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dp_runtime.parallel.agreement import StepRecord
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.step_board import StepBoard
from tests.collectives.ranks import Outcome, outcome
from tests.workers.leftovers import wait_until


def missing_rank_case(c: RowCollective, board: StepBoard, where: str, room: Path) -> list[Outcome]:
    """The last rank never comes, but keeps its group open; the others wait, then try again."""
    c.barrier()
    if c.dp_rank == c.dp_size - 1:
        others = c.dp_size - 1
        wait_until(lambda: len(list(room.iterdir())) == others, "the others have given up", 40.0)
        return []
    call = calls(c, board)[where]
    outcomes = [outcome(call), outcome(call)]
    (room / f"rank {c.dp_rank} has given up").touch()
    return outcomes


def calls(c: RowCollective, board: StepBoard) -> dict[str, Callable[[], Any]]:
    """Everything a rank can wait in, by name."""
    rows, sums = torch.ones(2, 3), torch.ones(2 * c.dp_size, 3)
    counts = (2,) * c.dp_size
    return {
        "counts": lambda: c.all_gather_ints((1,)),
        "gather": lambda: c.all_gather(rows, counts),
        "uneven gather": lambda: c.all_gather(
            torch.ones(c.dp_rank + 1, 3), tuple(range(1, c.dp_size + 1))
        ),
        "reduce_scatter": lambda: c.reduce_scatter(sums, counts),
        "barrier": c.barrier,
        "board": lambda: board.all_gather_records(StepRecord(0, 0, 0, (1,))),
        "idle": lambda: idle_until_aborted(board),
    }  # fmt: skip


def idle_until_aborted(board: StepBoard) -> None:
    """Sleep like a rank without requests, in as many naps as the board takes."""
    end = time.monotonic() + 20.0
    while time.monotonic() < end:
        board.idle(20.0)


def use_after_case(c: RowCollective, board: StepBoard, ending: str) -> dict[str, Outcome]:
    """Everything a rank can call after an abort or a close of its own."""
    outcome(c.barrier)  # a rank that is slow to leave it may hear the abort in it
    if ending == "close":
        c.close()
        board.close()
    elif c.dp_rank == 0:
        c.abort("for a test")
    else:
        outcome(c.barrier)
    ended = {name: outcome(call) for name, call in calls(c, board).items()}
    ended["check"] = outcome(c.raise_if_failed)
    board.wake()
    c.abort("again")
    board.abort("again")
    c.close()
    c.close()
    return ended


def abort_case(
    c: RowCollective, board: StepBoard, where: str, lost: int, how: str, by_board: bool, room: Path
) -> tuple[float, Outcome, Outcome]:
    """One rank never comes; the lowest other one aborts from a second thread after 0.15 s.

    A rank that is late comes after the abort.

    Returns when it aborted (0.0 on the others), how the wait of this rank ended, and its next.
    """
    c.barrier()
    if c.dp_rank == lost:
        match how:
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "late":
                wait_until((room / "aborted").exists, "an abort", 40.0)
    aborted_at = 0.0

    def abort() -> None:
        nonlocal aborted_at
        time.sleep(0.15)
        aborted_at = time.monotonic()
        (board if by_board else c).abort("rank is lost")
        (room / "aborted").touch()

    thread = threading.Thread(target=abort)
    if c.dp_rank == (1 if lost == 0 else 0):
        thread.start()
    ended = outcome(calls(c, board)[where])
    if thread.ident is not None:
        thread.join()
    return aborted_at, ended, outcome(c.barrier)


def close_case(c: RowCollective, board: StepBoard, room: Path) -> Outcome:
    """Rank 0 waits in vain, and a second thread of it closes the group."""
    c.barrier()
    if c.dp_rank != 0:
        wait_until((room / "closed").exists, "rank 0 has closed", 40.0)
        return outcome(lambda: None)
    threading.Timer(0.15, c.close).start()
    ended = outcome(c.barrier)
    (room / "closed").touch()
    return ended
