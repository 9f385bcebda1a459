"""Row collectives and a step board over torch.distributed, for ranks of several hosts or GPUs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from socket import socket
from typing import Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from collectives.member import Group, GroupMember
from collectives.rows import check_gather, check_reduce_scatter
from collectives.torch_distributed.abort_channel import AbortChannel, own_address
from collectives.torch_distributed.gloo import GlooBackend, GlooBoard, GlooRows, make_gloo
from collectives.torch_distributed.nccl import NcclRows, set_environment
from collectives.torch_distributed.state import SLACK_S, GroupState, Phase
from collectives.torch_distributed.store import empty_store, open_store
from dp_runtime.core.membership import Membership
from dp_runtime.errors import CollectiveAborted, StartError, require
from dp_runtime.parallel.collective import Counts

_CPU = torch.device("cpu")
_LEAVE_S = 2.0  # to leave together, where nothing has failed
_PAUSES = 4  # times timeout_s until Gloo gives up itself: its clock goes on while ranks are paused


class TorchDistributedGroup:
    """One rank's end of a torch.distributed group; StartError if the ranks do not come together."""

    def __init__(
        self,
        init_method: str,  # file:///path (one host) or tcp://host:port; new for every group
        dp_rank: int,
        dp_size: int,
        timeout_s: float,  # of every wait of a step
        backend: str = "gloo",  # of rows; counts, barriers and records always go over Gloo
        device: torch.device = _CPU,
        attach_timeout_s: float = 60.0,  # of the start
        secret: str = "",  # lets ranks in
        listener: socket | None = None,  # rank 0's, for the store
        members: Membership | None = None,  # their names, for texts
    ) -> None:
        require(backend in ("gloo", "nccl"), "backend", backend, "gloo or nccl")
        require(0 <= dp_rank < dp_size, "dp_rank", dp_rank, f"0..{dp_size - 1}")
        self._name = (members or Membership.first(dp_size)).dp_ranks[dp_rank]
        self._nccl: NcclRows | None = None
        self._state = GroupState(release=self._release_device)
        if backend == "nccl":
            set_environment()
        store = self._meet(init_method, dp_rank, dp_size, attach_timeout_s, secret, listener)
        place = (dp_rank, dp_size, own_address(init_method), _PAUSES * timeout_s + SLACK_S)
        for name in ("control", "board"):
            self._state.add(name, make_gloo(PrefixStore(name, store), *place))
        if backend == "nccl":
            rows_store = PrefixStore("rows", store)
            rest = (timeout_s, attach_timeout_s, self._name)
            try:
                self._nccl = NcclRows(self._state, rows_store, dp_rank, dp_size, device, *rest)
            except BaseException:
                self.close()
                raise
        control = GlooBackend(self._state, "control", timeout_s)
        rows = self._nccl or GlooRows(control, dp_rank)
        self.collective = TorchDistributedCollective(self, control, rows, dp_rank, dp_size)
        records = GlooBackend(self._state, "board", timeout_s)
        self.board = GlooBoard(self, records, dp_rank, dp_size)
        if init_method.startswith("tcp:"):
            self.collective.barrier()  # all have met: NCCL's communicators are made as well
            if dp_rank == 0:
                empty_store(store)

    def raise_if_failed(self) -> None:
        self._state.raise_if_failed()

    def abort(self, reason: str) -> None:
        if self._state.phase is Phase.OPEN:
            text = f"aborted by rank {self._name}: {reason}"
            self._alarm.sound(text)
            self._state.close(CollectiveAborted(text))

    def close(self) -> None:
        """Leave; with NCCL together, for a peer's device may still read this rank's memory."""
        if self._nccl is not None and self._state.phase is Phase.OPEN:
            self._nccl.drain(_LEAVE_S)
            self._alarm.leave(_LEAVE_S)
        self._state.close(CollectiveAborted("this rank has closed its group"))
        self._release_device()  # the device is free once this returns
        self._state.join(SLACK_S)
        self._alarm.close()

    def _release_device(self) -> None:
        if self._nccl is not None:
            self._nccl.abort()

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
                f"rank {self._name} of {dp_size} could not meet the others at {init_method} "
                f"within {timeout_s:g} s: {error}"
            ) from error
        return store

    def _hear(self, alarm: str) -> None:
        self._state.close(CollectiveAborted(alarm))


class Rows(Protocol):
    """Moves rows whose counts are checked, where some rank has any."""

    def gather(self, out: Tensor, rows: Tensor, counts: Counts) -> None: ...

    def reduce_scatter(self, out: Tensor, rows: Tensor, counts: Counts) -> None: ...

    def arm_watchdog(self, what: str) -> None: ...


class TorchDistributedCollective(GroupMember):
    def __init__(
        self, group: Group, control: GlooBackend, rows: Rows, dp_rank: int, dp_size: int
    ) -> None:
        super().__init__(group, dp_rank, dp_size)
        self._control, self._rows = control, rows
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        return self._waited_s  # in calls of the backend, which does not tell waiting from moving

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        own = torch.tensor([list(values)], dtype=torch.int64)
        out = own.new_empty(self.dp_size, own.shape[1])
        with self._counted():
            self._control.run("all_gather_ints", lambda gloo: gloo._allgather_base(out, own))
        return tuple(tuple(row) for row in out.tolist())

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        out = rows.new_empty(sum(counts), *rows.shape[1:])
        if out.numel():
            with self._counted():
                self._rows.gather(out, rows.contiguous(), counts)
        return out

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        check_reduce_scatter(rows, counts, self.dp_size)
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        if rows.numel():
            with self._counted():
                self._rows.reduce_scatter(out, rows.contiguous(), counts)
        return out

    def barrier(self) -> None:
        self.all_gather_ints((0,))

    def arm_watchdog(self, what: str) -> None:
        self._rows.arm_watchdog(what)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        before = time.monotonic()
        try:
            yield
        finally:
            self._waited_s += time.monotonic() - before
