"""Row collectives and a step board over torch.distributed, for ranks of several hosts or GPUs.

The backends are made directly and not through `init_process_group`: there is one world per
process, and a process that has aborted a group must be able to join the next one at once, while
Gloo can take until its timeout to give up the operations of the old one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from socket import socket
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from collectives.rows import check_gather, check_reduce_scatter
from collectives.torch_distributed.abort_channel import AbortChannel, own_address
from collectives.torch_distributed.gloo import GlooBoard, GlooRows, make_gloo
from collectives.torch_distributed.nccl import NcclRows, set_environment
from collectives.torch_distributed.store import empty_store, open_store
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout, StartError, require
from dp_runtime.parallel.collective import Counts

_CPU = torch.device("cpu")
_LOOK_EVERY_S = 0.05  # how soon a waiter sees an abort: Gloo can not be interrupted
_SLACK_S = 1.0  # by which Gloo's own timeout is later than ours
_LEAVE_S = 2.0  # to leave together, where nothing has failed


class TorchDistributedGroup:
    """One rank's end of a torch.distributed group.

    init_method: file:///path (one host) or tcp://host:port, the same for all ranks and new for
    every group. backend "nccl" moves rows of `device` over NCCL; counts, barriers and records
    always go over Gloo. timeout_s bounds every wait of a step, attach_timeout_s the start.
    secret lets ranks in; with tcp, rank 0 hosts the store, on `listener` if it listens already.
    Raises StartError if the ranks do not come together.
    """

    def __init__(
        self,
        init_method: str,
        dp_rank: int,
        dp_size: int,
        timeout_s: float,
        backend: str = "gloo",
        device: torch.device = _CPU,
        attach_timeout_s: float = 60.0,
        secret: str = "",
        listener: socket | None = None,
    ) -> None:
        require(backend in ("gloo", "nccl"), "backend", backend, "gloo or nccl")
        require(0 <= dp_rank < dp_size, "dp_rank", dp_rank, f"0..{dp_size - 1}")
        self._timeout_s = timeout_s
        self._failure: RuntimeError | None = None  # why this group can not be used any more
        self._lock = threading.Lock()
        self._backends: dict[str, Any] = {}
        self._nccl: NcclRows | None = None
        self._undertaker: threading.Thread | None = None
        if backend == "nccl":
            set_environment()
        store = self._meet(init_method, dp_rank, dp_size, attach_timeout_s, secret, listener)
        place = (dp_rank, dp_size, own_address(init_method), timeout_s + _SLACK_S)
        for name in ("control", "board"):
            self._backends[name] = make_gloo(PrefixStore(name, store), *place)
        if backend == "nccl":
            rows_store, timeouts = PrefixStore("rows", store), (timeout_s, attach_timeout_s)
            try:
                self._nccl = NcclRows(self, rows_store, dp_rank, dp_size, device, *timeouts)
            except BaseException:
                self.close()
                raise
        rows = self._nccl or GlooRows(self, dp_rank)
        self.collective = TorchDistributedCollective(self, rows, dp_rank, dp_size)
        self.board = GlooBoard(self, dp_rank, dp_size)
        if init_method.startswith("tcp:"):
            self.collective.barrier()  # all have met: NCCL's communicators are made as well
            if dp_rank == 0:
                empty_store(store)

    def raise_if_failed(self) -> None:
        """Raise CollectiveAborted or CollectiveTimeout if this group can not be used any more."""
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)

    def run(self, what: str, backend: str, start: Callable[[Any], Any]) -> None:
        """Start an operation on a Gloo backend and wait for it, timeout_s at most."""
        deadline = time.monotonic() + self._timeout_s
        # Under the lock, so that the backend's last reference is never dropped here: its
        # destructor waits for its operations.
        with self._lock:
            self.raise_if_failed()
            work = start(self._backends[backend])
        while True:
            left, ended = deadline - time.monotonic(), work.is_completed()
            try:
                work.wait(timedelta(seconds=min(_LOOK_EVERY_S, max(left, 0.001))))
                return
            except RuntimeError as error:  # the backend's, or only that this look has ended
                self.raise_if_failed()
                if ended:
                    self.lose(what, error)
                if left <= 0:
                    message = f"{what}: a peer did not come within {self._timeout_s:g} s"
                    self._failure = CollectiveAborted(f"timed out before ({message})")
                    raise CollectiveTimeout(message) from error

    def lose(self, what: str, error: RuntimeError) -> NoReturn:
        """Raise what a backend says, or the abort that is behind it.

        A peer that aborts closes its connections, and its alarm may be a moment later.
        """
        deadline = time.monotonic() + _SLACK_S
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        self._failure = self._failure or CollectiveAborted(f"{what} failed: {error}")
        raise CollectiveAborted(*self._failure.args) from error

    def fail(self, failure: RuntimeError) -> None:
        """Free this rank's waiters with the failure; the first one stays."""
        self._failure = self._failure or failure
        with self._lock:
            if self._undertaker is not None:
                return
            backends, self._backends = self._backends, {}
            self._undertaker = threading.Thread(
                target=_bury, args=(self._nccl, backends), daemon=True
            )
            self._undertaker.start()

    def abort(self, dp_rank: int, reason: str) -> None:
        """Free every waiter of every rank; the first reason stays."""
        if self._failure is None:
            text = f"aborted by rank {dp_rank}: {reason}"
            self._alarm.sound(text)
            self.fail(CollectiveAborted(text))

    def close(self) -> None:
        """Leave the group; this rank's own waiters are freed, peers are not told.

        With NCCL, healthy ranks leave together: a peer's device may still read what this rank's
        lent it.
        """
        if self._nccl is not None and self._failure is None:
            self._nccl.drain(_LEAVE_S)
            self._alarm.leave(_LEAVE_S)
        self.fail(CollectiveAborted("this rank has closed its group"))
        assert self._undertaker is not None, "the end of a group starts its undertaker"
        if self._nccl is not None:
            self._nccl.abort()  # the device is free once this returns
        self._undertaker.join(_SLACK_S)
        self._alarm.close()

    def _meet(
        self,
        init_method: str,
        dp_rank: int,
        dp_size: int,
        timeout_s: float,
        secret: str,
        listener: socket | None,
    ) -> Store:
        try:
            store = open_store(init_method, dp_rank, dp_size, timeout_s, listener)
            place = (dp_rank, dp_size, own_address(init_method), timeout_s)
            self._alarm = AbortChannel(store, *place, secret.encode(), self._hear)
        except (OSError, RuntimeError) as error:
            raise StartError(
                f"rank {dp_rank} of {dp_size} could not meet the others at {init_method} "
                f"within {timeout_s:g} s: {error}"
            ) from error
        return store

    def _hear(self, alarm: str) -> None:
        self.fail(CollectiveAborted(alarm))


def _bury(nccl: NcclRows | None, backends: dict[str, Any]) -> None:
    """Let go of the backends, in a thread that may take its time."""
    try:
        if nccl is not None:
            nccl.abort()
    finally:
        backends.clear()


class Rows(Protocol):
    """How rows move, once their counts are checked and some rank has any."""

    def gather(self, out: Tensor, rows: Tensor, counts: Counts) -> None: ...

    def reduce_scatter(self, out: Tensor, rows: Tensor, counts: Counts) -> None: ...

    def arm_watchdog(self, what: str) -> None: ...


class TorchDistributedCollective:
    """RowCollective over a torch.distributed group.

    Gloo sums half types in float32, NCCL as it does; the order of the ranks is the backend's.
    """

    def __init__(
        self, group: TorchDistributedGroup, rows: Rows, dp_rank: int, dp_size: int
    ) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._group, self._rows = group, rows
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds spent in calls of the backend: it does not tell waiting from moving."""
        return self._waited_s

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """All ranks' values (equally many on each rank), [rank][value]."""
        own = torch.tensor([list(values)], dtype=torch.int64)
        out = own.new_empty(self.dp_size, own.shape[1])
        with self._counted():
            self._group.run(
                "all_gather_ints", "control", lambda gloo: gloo._allgather_base(out, own)
            )
        return tuple(tuple(row) for row in out.tolist())

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        """Own rows [counts[dp_rank], hidden] -> all ranks' rows [sum(counts), hidden]."""
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        out = rows.new_empty(sum(counts), *rows.shape[1:])
        if out.numel():
            with self._counted():
                self._rows.gather(out, rows.contiguous(), counts)
        return out

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        """Partial sums [sum(counts), hidden] -> own rows [counts[dp_rank], hidden], summed."""
        check_reduce_scatter(rows, counts, self.dp_size)
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        if rows.numel():
            with self._counted():
                self._rows.reduce_scatter(out, rows.contiguous(), counts)
        return out

    def barrier(self) -> None:
        """Return once all ranks have called it."""
        self.all_gather_ints((0,))

    def arm_watchdog(self, what: str) -> None:
        """Bound the device's wait for what was launched so far, as a graph's replay is."""
        self._rows.arm_watchdog(what)

    def raise_if_failed(self) -> None:
        """Raise if the group has failed: what a device did since may be worth nothing."""
        self._group.raise_if_failed()

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""
        self._group.abort(self.dp_rank, reason)

    def close(self) -> None:
        """Close the whole group of this rank; callable more than once."""
        self._group.close()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        before = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - before
