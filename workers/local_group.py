"""Ranks as plain processes, or as threads of this process: the same Worker without Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

import torch

from collectives.in_process import InProcessGroup
from dp_runtime.config import EngineConfig
from dp_runtime.errors import RankFailed
from workers.devices import resolve_device
from workers.group import WorkerGroup
from workers.messages import CONCURRENCY_GROUPS, Call, Reply
from workers.worker import Worker

EXIT_S = 1.0


def import_path() -> str:
    """PYTHONPATH with which a rank imports what this process imports.

    An empty entry is the working directory, which the driver then searches too. Without one a rank
    must not: `python -m` would put it first, hence the -P beside it.
    """
    return os.pathsep.join(entry or os.getcwd() for entry in sys.path)


class ThreadRank:
    """A rank in this process: its Worker, with a thread for each lane of calls."""

    def __init__(self, dp_rank: int, config: EngineConfig, device: str) -> None:
        self.dp_rank = dp_rank
        self.worker = Worker(dp_rank, config, device)
        self._lanes = {lane: ThreadPoolExecutor(1) for lane in set(CONCURRENCY_GROUPS.values())}

    def call(self, method: str, *args: Any) -> Future[Any]:
        return self._lanes[CONCURRENCY_GROUPS[method]].submit(getattr(self.worker, method), *args)

    def kill(self) -> None:
        self.worker.abandon("it was ended by the driver")
        for lane in self._lanes.values():
            lane.shutdown(wait=False)


class ProcessRank:
    """A rank in a process of its own, reached over a pair of sockets.

    The process is started from an executable module, not by re-importing the caller's script,
    and in a session of its own: Ctrl-C reaches the driver only. It ends when its socket closes.
    """

    def __init__(self, dp_rank: int, config: EngineConfig, device: str) -> None:
        self.dp_rank = dp_rank
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "workers.local_rank", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": import_path()},
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        self._calls: dict[int, Future[Any]] = {}
        self._ids = count()
        self._lock = threading.Lock()
        self._ended = False
        self._connection.send((dp_rank, config, device))
        threading.Thread(target=self._receive, daemon=True).start()

    def call(self, method: str, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._ended:
                future.set_exception(self._gone())
                return future
            call = Call(next(self._ids), method, args)
            self._calls[call.call_id] = future
            try:
                self._connection.send(call)
            except OSError:
                del self._calls[call.call_id]
                future.set_exception(self._gone())
        return future

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _receive(self) -> None:
        while True:
            try:
                reply: Reply = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                future = self._calls.pop(reply.call_id)
            if reply.error is not None:
                future.set_exception(reply.error)
            else:
                future.set_result(reply.value)
        with self._lock:
            self._ended = True
            calls, self._calls = self._calls, {}
            self._connection.close()
        for future in calls.values():
            future.set_exception(self._gone())

    def _gone(self) -> RankFailed:
        try:
            code = self._process.wait(EXIT_S)  # the kernel closes its socket a little before
        except subprocess.TimeoutExpired:
            return RankFailed(f"rank {self.dp_rank} closed its connection")
        how = f"exit status {code}" if code >= 0 else signal.Signals(-code).name
        return RankFailed(f"the process of rank {self.dp_rank} ended ({how})")


def start_local(config: EngineConfig) -> WorkerGroup:
    """Start the ranks as processes of this host, or as threads of this process."""
    config = resolve_device(config, torch.cuda.device_count(), "this host")
    threads = config.launcher == "thread"
    rank_class = ThreadRank if threads else ProcessRank
    group = InProcessGroup(config.dp_size, config.step_timeout_s) if threads else None
    handles: list[ThreadRank | ProcessRank] = []
    try:
        for rank in range(config.dp_size):
            gpu = rank // config.ranks_per_gpu
            device = f"cuda:{gpu}" if config.device == "cuda" else "cpu"
            handles.append(rank_class(rank, config, device))
    except BaseException:
        for handle in handles:
            handle.kill()
        raise
    return WorkerGroup(config, handles, lambda: None, group)
