"""StandbyWorker: a process that is no rank yet, and then is the Worker of a lost one's number."""

from __future__ import annotations

import gc
import os
import socket
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from dp_runtime.config import EngineConfig
from dp_runtime.errors import RankFailed
from dp_runtime.metrics.log import log_to_stderr
from dp_runtime.metrics.status import RankHealth, RankState
from dp_runtime.startup.jit_modules import jit_modules_of
from dp_runtime.startup.rank_plan import plan_rank
from workers.messages import NO_RANK, Message, ReadHealth, TakeSeat, Warm
from workers.serial_thread import SerialThread
from workers.worker import Worker

NICENESS = 5  # of what is done before anybody needs it


class StandbyWorker:
    """Answers health, warms up and takes a seat; from then on it answers as the seat's Worker."""

    def __init__(self, make: type[Worker], config: EngineConfig, device: str) -> None:
        self._make, self._config, self._device = make, config, device
        self._state = RankState.STARTING
        self._worker: Worker | None = None

    def answer(self, message: Message[Any]) -> Any:
        match message:
            case Warm():
                return self.warm()
            case TakeSeat(dp_rank, gpu):
                return self.take_seat(dp_rank, gpu)
            case ReadHealth() if self._worker is None:
                return RankHealth(NO_RANK, self._state, os.getpid(), socket.gethostname())
        assert self._worker is not None, f"a standby that is no rank yet can not {message.name}"
        return self._worker.answer(message)

    def warm(self) -> str:
        """Do at low priority what needs neither a rank's number nor its GPU; returns the host."""
        log_to_stderr(self._config.log_level)
        thread = SerialThread("warm-up")  # on Linux priority is a thread's own, and only sinks
        warmed: Future[None] = thread.submit(self._warm)
        thread.end(RankFailed("the standby is warm"))
        warmed.result()
        self._state = RankState.READY
        return socket.gethostname()

    def take_seat(self, dp_rank: int, gpu: str) -> None:
        """Be this rank; on GPUs on the one with this UUID, where it makes its context now."""
        device = self._device if self._device == "cpu" else _device_of(gpu)
        if device != "cpu":
            torch.cuda.set_device(device)
            torch.cuda.synchronize()  # makes the context
        if sys.platform == "linux" and self._config.launcher == "local":
            Path("/proc/self/comm").write_text(f"dp-rank-{dp_rank}")  # which `ps -o comm` shows
        self._worker = self._make(dp_rank, self._config, device)

    def _warm(self) -> None:
        if sys.platform == "linux":
            os.nice(NICENESS)
        plan = plan_rank(self._config, 0, self._device)
        jit_modules_of(plan)  # imports them; they are loaded on the GPU of the lost rank
        gc.collect()
        gc.freeze()  # or it would be walked over as the seat's rank loads


def _device_of(gpu: str) -> str:
    """Find a GPU among those that this process sees, all of its host's; RankFailed without it."""
    for index in range(torch.cuda.device_count()):
        if str(torch.cuda.get_device_properties(index).uuid) == gpu:
            return f"cuda:{index}"
    raise RankFailed(f"a standby on {socket.gethostname()} does not see GPU {gpu!r}")


def worker_for(
    dp_rank: int, config: EngineConfig, device: str, make: type[Worker] = Worker
) -> Worker | StandbyWorker:
    if dp_rank == NO_RANK:
        return StandbyWorker(make, config, device)
    return make(dp_rank, config, device)
