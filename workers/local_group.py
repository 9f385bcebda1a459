"""Ranks as plain processes, or as threads of this process: the same Worker without Ray."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

import torch

from collectives.in_process import InProcessGroup
from collectives.session import session_token
from dp_runtime.config import EngineConfig
from dp_runtime.core.membership import Membership
from dp_runtime.errors import RankFailed, StartError
from dp_runtime.startup.devices import resolve_device
from workers.forkserver import ForkServer, rank_environment
from workers.messages import (
    NO_RANK,
    ConcurrencyGroup,
    InProcessRendezvous,
    Message,
    named,
)
from workers.rank_connection import RankConnection
from workers.serial_thread import SerialThread
from workers.supervision.interrupts import uninterrupted
from workers.worker import Worker
from workers.worker_group import WorkerGroup

EXIT_S = 1.0
KILL_S = 5.0
Answer = TypeVar("Answer")
# torch imports its compiler, for a second, at the first torch.cat of meta tensors: see rank_plan.
PRELOAD = ("workers.local_rank", "torch._dynamo")
_STARTING = threading.Lock()
_log = logging.getLogger(__name__)


class Answering(Protocol):
    def answer(self, message: Message[Any]) -> Any: ...


class WorkerThreads:
    """A worker with a thread for each group of messages."""

    def __init__(self, worker: Answering) -> None:
        self._worker = worker
        self._threads = {group: SerialThread(f"messages-{group}") for group in ConcurrencyGroup}

    def call(self, message: Message[Answer]) -> Future[Answer]:
        return self._threads[message.group].submit(lambda: self._answer(message))

    def _answer(self, message: Message[Answer]) -> Answer:
        answer: Answer = self._worker.answer(message)
        return answer

    def end(self, error: RankFailed) -> None:
        for thread in self._threads.values():
            thread.end(error)


class ThreadRank:
    """A rank in this process."""

    def __init__(self, dp_rank: int, config: EngineConfig, device: str) -> None:
        self.dp_rank = dp_rank
        self.worker = Worker(dp_rank, config, device)
        self._threads = WorkerThreads(self.worker)

    def call(self, message: Message[Answer]) -> Future[Answer]:
        return self._threads.call(message)

    def kill(self) -> None:
        self.worker.abandon("it was ended by the driver")
        self._threads.end(RankFailed(f"rank {self.dp_rank} has ended"))
        self.worker.release()


class ChildProcess(Protocol):
    """A process of this host, as subprocess.Popen shows it."""

    def kill(self) -> None: ...

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit status, negative for a signal; subprocess.TimeoutExpired if it runs."""


class ProcessRank:
    """A rank in a process of its own, reached over a pair of sockets; it ends when they close."""

    def __init__(self, dp_rank: int, config: EngineConfig, device: str) -> None:
        self.dp_rank = dp_rank
        start = _fork if device == "cpu" and sys.platform == "linux" else _spawn
        self._process, connection = start(dp_rank, config.start_timeout_s)
        connection.send((dp_rank, config, device))
        self._connection = RankConnection(connection, self._gone)

    def call(self, message: Message[Answer]) -> Future[Answer]:
        return self._connection.call(message)

    def kill(self) -> None:
        self._process.kill()
        with suppress(subprocess.TimeoutExpired):  # a device may hold it for a while
            self._process.wait(KILL_S)

    def _gone(self) -> RankFailed:
        try:
            code = self._process.wait(EXIT_S)  # the kernel closes its socket a little before
        except subprocess.TimeoutExpired:
            return RankFailed(f"{named(self.dp_rank)} closed its connection")
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        return RankFailed(f"the process of {named(self.dp_rank)} ended ({how})")


def _fork(dp_rank: int, timeout_s: float) -> tuple[ChildProcess, Connection]:
    name = "dp-rank-standby" if dp_rank == NO_RANK else f"dp-rank-{dp_rank}"
    return _fork_server().fork("workers.local_rank:serve", name, timeout_s)


def _spawn(dp_rank: int, timeout_s: float) -> tuple[ChildProcess, Connection]:
    """Start a rank in a fresh interpreter, as GPUs need: CUDA's state does not survive a fork."""
    ours, theirs = socket.socketpair()
    fds = (theirs.fileno(), os.pidfd_open(os.getpid()))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "workers.local_rank", session_token(), *map(str, fds)],
        pass_fds=fds, stdin=subprocess.DEVNULL, start_new_session=True, env=rank_environment(),
    )  # fmt: skip
    theirs.close()
    os.close(fds[1])
    return process, Connection(ours.detach())


_servers: list[ForkServer] = []  # the one in use, started with the first rank


def _fork_server() -> ForkServer:
    """Return the server of this process, which later engines find warm."""
    with _STARTING:
        if not (_servers and _servers[-1].usable):
            for outdated in _servers:
                outdated.close()
            _servers[:] = [ForkServer(*PRELOAD)]
            threading.Thread(
                target=_replace_if_lost, args=_servers, name="fork-server", daemon=True
            ).start()
        return _servers[0]


def _replace_if_lost(server: ForkServer) -> None:
    """Have another at hand before a rank is lost: its imports take seconds."""
    if server.wait_for_loss():
        _log.warning("the process that starts ranks has ended; another is started")
        _fork_server()


@dataclass(frozen=True)
class LocalLauncher:
    config: EngineConfig

    @property
    def threads(self) -> bool:
        return self.config.launcher == "thread"

    def launch(self, dp_rank: int) -> ThreadRank | ProcessRank:
        gpu = max(dp_rank, 0) // self.config.ranks_per_gpu  # a standby sees them all
        device = f"cuda:{gpu}" if self.config.device == "cuda" else "cpu"
        return (ThreadRank if self.threads else ProcessRank)(dp_rank, self.config, device)

    def meeting(self, members: Membership) -> InProcessRendezvous | None:
        if not self.threads:
            return None
        group = InProcessGroup(members.size, self.config.step_timeout_s, members)
        return InProcessRendezvous(group)

    def make_room(self, dp_ranks: Sequence[int], timeout_s: float) -> None:
        if self.config.device != "cuda":
            return
        num_gpus = torch.cuda.device_count()
        homeless = [rank for rank in dp_ranks if rank // self.config.ranks_per_gpu >= num_gpus]
        if homeless:
            raise StartError(f"no room for ranks {homeless}: this host has {num_gpus} GPUs")

    def give_room(self, dp_ranks: Sequence[int]) -> None: ...

    def release(self) -> None: ...


def start_local(config: EngineConfig) -> WorkerGroup:
    config = resolve_device(config, torch.cuda.device_count(), "this host")
    launcher = LocalLauncher(config)
    handles: list[ThreadRank | ProcessRank] = []
    interrupted = threading.Event()

    def begin() -> None:
        for rank in range(config.dp_size):
            if not interrupted.is_set():
                handles.append(launcher.launch(rank))

    def end() -> None:
        for handle in handles:
            handle.kill()

    try:
        uninterrupted(begin, interrupted.set)
    except BaseException:
        uninterrupted(end, lambda: None)
        raise
    return WorkerGroup(config, launcher, handles)
