"""Rows and step records over Gloo."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from collectives.awake_clock import Deadline
from collectives.member import Group, GroupMember
from collectives.rows import split, summing_dtype
from collectives.torch_distributed.state import GroupState
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout
from dp_runtime.parallel.agreement import RECORD_WORDS, StepRecord
from dp_runtime.parallel.collective import Counts

_LOOK_EVERY_S = 0.05  # how soon a waiter sees an abort: Gloo can not be interrupted
_IDLE_S = 0.003  # ranks that idle keep meeting, since a peer's post can not wake them


def make_gloo(store: Store, dp_rank: int, dp_size: int, address: str, timeout_s: float) -> Any:
    """Connect a Gloo group that listens on one address, or where GLOO_SOCKET_IFNAME says."""
    gloo: Any = dist.ProcessGroupGloo
    timeout = timedelta(seconds=timeout_s)
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return gloo(store, dp_rank, dp_size, timeout)
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    return gloo(store, dp_rank, dp_size, options)


class GlooBackend:
    """One of a group's Gloo backends, whose operations this rank waits for, timeout_s at most."""

    def __init__(self, state: GroupState, name: str, timeout_s: float) -> None:
        self._state, self._name, self._timeout_s = state, name, timeout_s

    def run(self, what: str, start: Callable[[Any], Any]) -> None:
        deadline = Deadline(self._timeout_s)
        work = self._state.start(self._name, start)
        while True:
            left, ended = deadline.left(), work.is_completed()
            try:
                work.wait(timedelta(seconds=min(_LOOK_EVERY_S, max(left, 0.001))))
                return
            except RuntimeError as error:  # the backend's, or only that this look has ended
                self._state.raise_if_failed()
                if ended:
                    self._state.raise_lost(what, error)
                if left <= 0:
                    message = f"{what}: a peer did not come within {self._timeout_s:g} s"
                    self._state.fail(CollectiveAborted(f"timed out before ({message})"))
                    raise CollectiveTimeout(message) from error


class GlooRows:
    def __init__(self, gloo: GlooBackend, dp_rank: int) -> None:
        self._gloo, self._rank = gloo, dp_rank

    def gather(self, out: Tensor, rows: Tensor, counts: Counts) -> None:
        if len(set(counts)) == 1:
            self._gloo.run("all_gather", lambda gloo: gloo._allgather_base(out, rows))
            return
        parts = split(out, counts)  # all-gathers take equal sizes only: a broadcast per rank
        parts[self._rank].copy_(rows)
        for root, part in enumerate(parts):
            if len(part):
                self._gloo.run("all_gather", partial(_broadcast, part, root))

    def reduce_scatter(self, out: Tensor, rows: Tensor, counts: Counts) -> None:
        total = rows.to(summing_dtype(rows.dtype), copy=True).contiguous()
        self._gloo.run("reduce_scatter", lambda gloo: gloo.allreduce(total))
        out.copy_(split(total, counts)[self._rank])

    def arm_watchdog(self, what: str) -> None:
        pass  # the host waits for every operation itself


def _broadcast(part: Tensor, root: int, gloo: Any) -> Any:
    return gloo.broadcast(part, root)


class GlooBoard(GroupMember):
    def __init__(self, group: Group, gloo: GlooBackend, dp_rank: int, dp_size: int) -> None:
        super().__init__(group, dp_rank, dp_size)
        self._gloo = gloo
        self._woken = threading.Event()
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._waited_s

    def all_gather_records(self, record: StepRecord) -> tuple[StepRecord, ...]:
        own = torch.tensor([record.to_words()], dtype=torch.int64)
        out = own.new_empty(self.dp_size, RECORD_WORDS)
        what = f"record of step {record.step_id}"
        before = time.monotonic()
        self._gloo.run(what, lambda gloo: gloo._allgather_base(out, own))
        self._waited_s += time.monotonic() - before
        return tuple(StepRecord.from_words(words) for words in out.tolist())

    def idle(self, timeout_s: float) -> None:
        self.raise_if_failed()
        self._woken.wait(min(timeout_s, _IDLE_S))
        self._woken.clear()
        self.raise_if_failed()

    def wake(self) -> None:
        self._woken.set()
