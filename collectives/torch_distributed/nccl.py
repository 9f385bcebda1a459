"""Rows over NCCL, on the stream of the thread that calls."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import (
    AllgatherOptions,
    BroadcastOptions,
    ReduceOptions,
    ReduceScatterOptions,
    Store,
)

from collectives.rows import split
from collectives.torch_distributed.state import GroupState
from collectives.watchdog import Watchdog
from dp_runtime.errors import StartError
from dp_runtime.host.capturing import not_capturing
from dp_runtime.parallel.collective import Counts

# These keep torch from starting its own watchdog, which ends the process when a peer is lost, and
# its monitor; a Watchdog has their task here (docs/collectives.md).
ENVIRONMENT = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_FR_BUFFER_SIZE": "0"}
_GRACE_S = 1.0  # for a capture, and a launch, to end before an abort, which ends a stuck launch


def set_environment() -> None:
    """Set what torch reads when a process makes its first group, unless the user has."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


class NcclRows:
    """One rank's NCCL communicator, connected when the constructor returns (else StartError).

    A lost peer shows where the host next waits for its device; only `abort` ends that wait, and the
    device is usable afterwards. A watchdog aborts if the device stands still for timeout_s.
    """

    def __init__(
        self,
        state: GroupState,
        store: Store,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        timeout_s: float,
        start_timeout_s: float,
        name: int,  # the dp_rank, for texts
    ) -> None:
        self._state, self._rank, self._device = state, dp_rank, device
        self._gather, self._broadcast = AllgatherOptions(), BroadcastOptions()
        self._scatter, self._reduce = ReduceScatterOptions(), ReduceOptions()
        for each in (self._gather, self._broadcast, self._scatter, self._reduce):
            each.asyncOp = False  # on the current stream, and nothing to wait for
        self._launching, self._aborting = threading.Lock(), threading.Lock()
        self._aborted = False
        torch.cuda.set_device(device)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=timeout_s)  # of an abort
        self._backend: Any = dist.ProcessGroupNCCL(store, dp_rank, dp_size, options)
        try:
            _bounded(lambda: self._connect(dp_size), start_timeout_s)
        except (RuntimeError, TimeoutError) as error:
            raise StartError(
                f"rank {name} of {dp_size} could not connect to the others over NCCL "
                f"within {start_timeout_s:g} s: {error}"
            ) from error
        self._watch = Watchdog(timeout_s, state.close)

    def gather(self, out: Tensor, rows: Tensor, counts: Counts) -> None:
        if len(set(counts)) == 1:
            self._launch("all_gather", lambda nccl: nccl._allgather_base(out, rows, self._gather))
            return
        parts = split(out, counts)  # all-gathers take equal sizes only: a broadcast per rank
        parts[self._rank].copy_(rows)

        def broadcast(nccl: Any) -> None:
            for root, part in enumerate(parts):
                if len(part):
                    self._broadcast.rootRank = root
                    nccl.broadcast([part], self._broadcast)

        self._launch("all_gather", broadcast)

    def reduce_scatter(self, out: Tensor, rows: Tensor, counts: Counts) -> None:
        what = "reduce_scatter"
        if len(set(counts)) == 1:
            self._launch(what, lambda nccl: nccl._reduce_scatter_base(out, rows, self._scatter))
            return
        parts = list(split(rows, counts))
        parts[self._rank] = out.copy_(parts[self._rank])  # a root's sum takes the place of its part

        def reduce(nccl: Any) -> None:
            for root, part in enumerate(parts):
                if len(part):
                    self._reduce.rootRank = root
                    nccl.reduce([part], self._reduce)

        self._launch(what, reduce)

    def drain(self, timeout_s: float) -> None:
        self._watch.drain(timeout_s)

    def abort(self) -> None:
        """End this rank's kernels and communicator; callable from any thread.

        NOTE: NCCL ends kernels at once, but waits in its abort until no graph has any of them
        (init.cc, commDestroySync). Graphs go once the step has been left, which follows this.
        """
        with self._aborting:
            if self._aborted:
                return
            self._aborted = True
            self._watch.close()
            with not_capturing(_GRACE_S):  # a capture launches, so its turn comes first
                free = self._launching.acquire(timeout=_GRACE_S)
                try:
                    with suppress(TimeoutError):
                        _bounded(self._backend.abort, _GRACE_S)
                finally:
                    if free:
                        self._launching.release()

    def _connect(self, dp_size: int) -> None:
        torch.cuda.set_device(self._device)
        own = torch.zeros(1, device=self._device)
        self._backend._allgather_base(own.new_empty(dp_size), own, self._gather)
        torch.cuda.synchronize(self._device)

    def _launch(self, what: str, start: Callable[[Any], object]) -> None:
        with self._launching:
            self._state.raise_if_failed()
            try:
                start(self._backend)
            except RuntimeError as error:
                self._state.raise_lost(what, error)
        self.arm_watchdog(what)

    def arm_watchdog(self, what: str) -> None:
        self._watch.arm(what, self._device)


def _bounded(call: Callable[[], None], timeout_s: float) -> None:
    """Run a call that can not be interrupted; TimeoutError leaves it behind in its thread."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            call()
        except BaseException as error:
            outcome.set_exception(error)
        else:
            outcome.set_result(None)

    threading.Thread(target=run, name="nccl", daemon=True).start()
    outcome.result(timeout_s)
