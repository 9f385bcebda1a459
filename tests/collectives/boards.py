"""What ranks do in the tests of the step board; each function runs on every rank of a group."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from dp_runtime.core.step_program import SERVING_PROGRAMS
from dp_runtime.errors import RankDisagreement
from dp_runtime.parallel.agreement import StepRecord, agree
from dp_runtime.parallel.collective import RowCollective
from dp_runtime.parallel.step_board import StepBoard


def record_of(dp_rank: int, step: int) -> StepRecord:
    """A record whose every field differs between ranks or steps."""
    return StepRecord(
        epoch=3, step_id=step, program_id=0, real_rows=(dp_rank * 7 + step,),
        queued_tokens=10**12 + step * dp_rank, drafts_proposed=4, drafts_accepted=dp_rank,
        graph_votes=dp_rank % 2, fault_bits=step % 2, waited_us=step + 5 * dp_rank,
        prefill_rows=dp_rank + 3, num_sampling=step % 3, step_us=10**6 * step + dp_rank,
    )  # fmt: skip


def exchange_case(c: RowCollective, board: StepBoard, steps: int) -> None:
    for step in range(steps):
        got = board.all_gather_records(record_of(board.dp_rank, step))
        assert got == tuple(record_of(rank, step) for rank in range(board.dp_size))


def disagreement_case(c: RowCollective, board: StepBoard, field: str) -> tuple[str, float]:
    """The last rank posts another epoch, step or program; all meet, and all see it."""
    board.all_gather_records(StepRecord(0, 0, 0, (1,)))
    values = {"epoch": 0, "step_id": 1, "program_id": 0}
    if board.dp_rank == board.dp_size - 1:
        values[field] += 5
    start = time.monotonic()
    records = board.all_gather_records(StepRecord(**values, real_rows=(1,)))
    try:
        agree(records, SERVING_PROGRAMS)
    except RankDisagreement as error:
        return str(error), time.monotonic() - start
    return "", 0.0


def interleaved_case(c: RowCollective, board: StepBoard) -> None:
    """The board in a thread of its own, while rows move in another."""
    errors: list[BaseException] = []

    def post() -> None:
        try:
            exchange_case(c, board, 50)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=post)
    thread.start()
    for turn in range(50):
        assert c.all_gather_ints((turn,)) == ((turn,),) * c.dp_size
    thread.join()
    assert not errors, errors


@dataclass
class Nap:
    """How long rank 0 slept, when it woke, and when a rank did what was to wake it."""

    seconds: float = 0.0
    woke_at: float = 0.0
    caused_at: float = 0.0


def idle_case(c: RowCollective, board: StepBoard, how: str) -> Nap:
    """Rank 0 sleeps; rank 1 posts after 0.3 s if that is what wakes it."""
    nap = Nap()

    def wake() -> None:
        nap.caused_at = time.monotonic()
        board.wake()

    c.barrier()
    start = time.monotonic()
    if board.dp_rank == 0:
        match how:
            case "timeout":
                board.idle(0.2)
            case "wake":
                threading.Timer(0.3, wake).start()
                board.idle(10.0)
            case "woken before":
                for _ in range(1000):
                    board.wake()
                board.idle(10.0)
            case "post":
                board.idle(10.0)
        nap.woke_at = time.monotonic()
        nap.seconds = nap.woke_at - start
        board.wake()  # one too many must not harm what follows
    if how == "post":
        time.sleep(0.3 if board.dp_rank else 0.0)
        nap.caused_at = time.monotonic()
    else:
        c.barrier()
    exchange_case(c, board, 3)
    return nap


def doze_case(c: RowCollective, board: StepBoard) -> float:
    """Processor seconds of half a second of idling."""
    c.barrier()
    start, used = time.monotonic(), time.thread_time()
    while time.monotonic() - start < 0.5:
        board.idle(0.5)
    return time.thread_time() - used
