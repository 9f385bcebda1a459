"""Ranks to run test cases in: threads, or processes that are kept from case to case.

Processes are forked from a server that has loaded torch once; importing it takes seconds.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from collectives.in_process import InProcessGroup
from collectives.shared_memory.group import SharedMemoryGroup, new_rendezvous_path

KINDS = ("in_process", "shared_memory", "torch_distributed")
PROCESS_KINDS = KINDS[1:]
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload([__name__, "collectives.torch_distributed.group"])
SOON_S = 10.0  # half of the waits that an abort ends, and far above what a busy machine takes
Case = Callable[..., Any]  # (collective, board, *arguments) -> result; a module-level function


@dataclass(frozen=True)
class Outcome:
    """How a call ended: the type and text of its error ("" if none), when, and after how long."""

    error: str
    message: str
    ended_at: float  # time.monotonic(), which all processes of a host share
    seconds: float


def outcome(call: Callable[[], Any]) -> Outcome:
    """Run the call and tell how it ended."""
    start = time.monotonic()
    error, message = "", ""
    try:
        call()
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    end = time.monotonic()
    return Outcome(error, message, end, end - start)


@dataclass(frozen=True)
class Job:
    """One case for one rank of a group."""

    kind: str
    address: str
    dp_rank: int
    dp_size: int
    timeout_s: float
    case: Case
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class Ranks:
    """Runs a case on all ranks of a fresh group and returns what each rank returned."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []

    def run(
        self, kind: str, dp_size: int, case: Case, *arguments: Any, timeout_s: float = 20.0,
        address: str = "", **options: Any,
    ) -> list[Any]:  # fmt: skip
        """Start the case and wait for all ranks."""
        self.start(kind, dp_size, case, *arguments, timeout_s=timeout_s, address=address, **options)
        return [self.result(rank) for rank in range(dp_size)]

    def start(
        self, kind: str, dp_size: int, case: Case, *arguments: Any, timeout_s: float = 20.0,
        address: str = "", **options: Any,
    ) -> None:  # fmt: skip
        """Start the case on all ranks; each one's result is to be fetched."""
        self._workers = [worker for worker in self._workers if worker.alive()]
        if kind == "in_process":
            self._threads = run_threads(dp_size, timeout_s, case, arguments)
            return
        self._threads = []
        while len(self._workers) < dp_size:
            self._workers.append(_Worker())
        address = address or _new_address(kind)
        for rank in range(dp_size):
            job = Job(kind, address, rank, dp_size, timeout_s, case, arguments, options)
            self._workers[rank].pipe.send(job)

    def result(self, dp_rank: int) -> Any:
        """What the case returned on this rank; raises what it raised, EOFError if it was killed."""
        if self._threads:
            return self._threads[dp_rank].result()
        worker = self._workers[dp_rank]
        assert worker.pipe.poll(60), f"rank {dp_rank} has not finished its case"
        ok, value = worker.pipe.recv()
        assert ok, f"rank {dp_rank} failed:\n{value}"
        return value

    def pid(self, dp_rank: int) -> int:
        pid = self._workers[dp_rank].process.pid
        assert pid is not None
        return pid

    def close(self) -> None:
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()


class RankThread(threading.Thread):
    """A case on one rank in a thread of this process."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._call, self._error, self._value = run, "", None
        self.start()

    def run(self) -> None:
        try:
            self._value = self._call()
        except Exception:
            self._error = traceback.format_exc()

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive(), "the case has not finished"
        assert not self._error, self._error
        return self._value


def run_threads(
    dp_size: int, timeout_s: float, case: Case, arguments: tuple[Any, ...]
) -> list[RankThread]:
    """Start a case on the threads of an in-process group."""
    group = InProcessGroup(dp_size, timeout_s)

    def start(rank: int) -> RankThread:
        collective, board = group.collective(rank), group.board(rank)
        return RankThread(lambda: case(collective, board, *arguments))

    return [start(rank) for rank in range(dp_size)]


class _Worker:
    """A process that runs jobs until its pipe closes."""

    def __init__(self) -> None:
        self.pipe, end = FORKSERVER.Pipe()
        self.process = FORKSERVER.Process(target=_work, args=(end,), daemon=True)
        self.process.start()
        end.close()

    def alive(self) -> bool:
        return self.process.is_alive()


def _work(pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, _run_job(job)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def _run_job(job: Job) -> Any:
    links = _connect(job)
    try:
        return job.case(links.collective, links.board, *job.arguments)
    finally:
        links.close()


def _connect(job: Job) -> Any:
    place = (job.address, job.dp_rank, job.dp_size, job.timeout_s)
    if job.kind == "shared_memory":
        return SharedMemoryGroup(*place, **job.options)
    if job.kind == "peer_to_peer":
        from collectives.peer_to_peer.group import PeerToPeerGroup

        device = torch.device("cuda", job.dp_rank % torch.cuda.device_count())
        return PeerToPeerGroup(*place, device, **job.options)
    from collectives.torch_distributed.group import TorchDistributedGroup  # slow to import

    if job.kind == "nccl":
        device = torch.device("cuda", job.dp_rank)
        return TorchDistributedGroup(*place, backend="nccl", device=device, **job.options)
    return TorchDistributedGroup(*place, **job.options)


def _new_address(kind: str) -> str:
    if kind in ("shared_memory", "peer_to_peer"):
        return new_rendezvous_path()
    return f"file://{Path(tempfile.mkdtemp()) / 'store'}"
