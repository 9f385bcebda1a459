"""Row collectives and a step board over torch.distributed, for ranks of several hosts or GPUs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from collectives.alarm import AlarmLine, own_address
from collectives.rows import check_gather, check_reduce_scatter, split
from dp_runtime.agreement import RECORD_WORDS, StepRecord
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout, StartError, require
from dp_runtime.protocols import Counts

# torch 2.13 has new names for these and warns about the old ones, which are all that 2.11 has.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_CPU = torch.device("cpu")
_IDLE_S = 0.003  # ranks that idle keep meeting, since a peer's post can not wake them
_ALARM_COMES_WITHIN_S = 1.0


class TorchDistributedGroup:
    """One rank's end of a torch.distributed group; there can be one per process at a time.

    init_method: file:///path (one host) or tcp://host:port, the same for all ranks and new for
    every group. backend "nccl" moves rows of `device` over NCCL; counts, barriers and records
    always go over Gloo. timeout_s bounds every wait of a step, attach_timeout_s the start.
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
    ) -> None:
        require(backend in ("gloo", "nccl"), "backend", backend, "gloo or nccl")
        require(0 <= dp_rank < dp_size, "dp_rank", dp_rank, f"0..{dp_size - 1}")
        self.timeout_s = timeout_s
        self.failure: str | None = None  # why this group can not be used any more
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._alive = True
        try:
            wait = timedelta(seconds=attach_timeout_s)
            store, _, _ = next(rendezvous(init_method, dp_rank, dp_size, timeout=wait))
            address = own_address(init_method)
            self._alarm = AlarmLine(
                store, dp_rank, dp_size, address, attach_timeout_s, self._end_groups
            )
        except (OSError, RuntimeError) as error:
            raise StartError(
                f"rank {dp_rank} of {dp_size} could not meet the others at {init_method} "
                f"within {attach_timeout_s:g} s: {error}"
            ) from error
        step = timedelta(seconds=timeout_s)
        dist.init_process_group("gloo", store=store, rank=dp_rank, world_size=dp_size, timeout=step)
        board = dist.new_group(backend="gloo", timeout=step)
        rows = dist.new_group(backend="nccl", timeout=step) if backend == "nccl" else None
        self._nccl = rows
        self.collective = TorchDistributedCollective(self, rows, dp_rank, dp_size)
        self.board = TorchDistributedBoard(self, board, dp_rank, dp_size)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around calls of the backend: its errors become CollectiveAborted or -Timeout."""
        self.check()
        start = time.monotonic()
        try:
            yield
        except (RuntimeError, ValueError) as error:
            self._explain(what, time.monotonic() - start, error)

    def check(self) -> None:
        """Raise CollectiveAborted if this group can not be used any more."""
        if self.failure is not None:
            raise CollectiveAborted(self.failure)

    def abort(self, dp_rank: int, reason: str) -> None:
        """Free every waiter of every rank; the first reason stays."""
        if not self._failed.is_set():
            text = f"aborted by rank {dp_rank}: {reason}"
            self._alarm.sound(text)
            self._end_groups(text)

    def close(self) -> None:
        """Leave the group; this rank's own waiters are freed."""
        self._end_groups("this rank has closed its group")
        self._alarm.close()

    def _end_groups(self, reason: str) -> None:
        """Destroy the process groups, which frees whoever waits in them (Gloo has no abort)."""
        with self._lock:
            self.failure = self.failure or reason
            self._failed.set()
            if not self._alive:
                return
            self._alive = False
            if self._nccl is not None:
                self._nccl.abort()
            if dist.is_initialized():
                dist.destroy_process_group()

    def _explain(self, what: str, waited_s: float, error: Exception) -> None:
        if not self._failed.is_set() and waited_s >= self.timeout_s:
            message = f"{what}: a peer did not come within {self.timeout_s:g} s"
            self.failure = f"timed out before ({message})"
            raise CollectiveTimeout(message) from error
        # A peer that has aborted closes its connections; its alarm may be a moment behind.
        self._failed.wait(_ALARM_COMES_WITHIN_S)
        self.failure = self.failure or f"{what} failed: {error}"
        raise CollectiveAborted(self.failure) from error


class TorchDistributedCollective:
    """RowCollective over a torch.distributed group.

    Half types are summed as the backend does it, which may be in their own precision.
    """

    def __init__(
        self,
        group: TorchDistributedGroup,
        rows_group: dist.ProcessGroup | None,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._group, self._rows_group = group, rows_group
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds spent in calls of the backend: it does not tell waiting from moving."""
        return self._waited_s

    def counts(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """All ranks' values (equally many on each rank), [rank][value]."""
        own = torch.tensor([list(values)], dtype=torch.int64)
        out = own.new_empty(self.dp_size, own.shape[1])
        with self._waiting("counts"):
            _all_gather(out, own)
        return tuple(tuple(row) for row in out.tolist())

    def gather_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Own rows [counts[dp_rank], hidden] -> all ranks' rows [sum(counts), hidden]."""
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        out = rows.new_empty(sum(counts), *rows.shape[1:])
        if out.numel() == 0:
            return out
        with self._waiting("gather_rows"):
            if len(set(counts)) == 1:
                _all_gather(out, rows.contiguous(), self._rows_group)
            else:
                self._broadcast_each(rows, split(out, counts))
        return out

    def reduce_scatter_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Partial sums [sum(counts), hidden] -> own rows [counts[dp_rank], hidden], summed."""
        check_reduce_scatter(rows, counts, self.dp_size)
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        if rows.numel() == 0:
            return out
        rows = rows.contiguous()
        with self._waiting("reduce_scatter_rows"):
            if len(set(counts)) == 1:
                _reduce_scatter(out, rows, group=self._rows_group)
            else:
                dist.reduce_scatter(out, list(split(rows, counts)), group=self._rows_group)
        return out

    def barrier(self) -> None:
        """Return once all ranks have called it."""
        self.counts((0,))

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""
        self._group.abort(self.dp_rank, reason)

    def close(self) -> None:
        """Close the whole group of this rank; callable more than once."""
        self._group.close()

    def _broadcast_each(self, rows: Tensor, parts: Sequence[Tensor]) -> None:
        """Fill the ranks' parts of the output; Gloo's all_gather takes equal sizes only."""
        parts[self.dp_rank].copy_(rows)
        works = [
            dist.broadcast(part, rank, self._rows_group, async_op=True)
            for rank, part in enumerate(parts)
            if len(part)
        ]
        for work in works:
            work.wait()

    @contextmanager
    def _waiting(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            with self._group.waiting(what):
                yield
        finally:
            self._waited_s += time.monotonic() - start


class TorchDistributedBoard:
    """StepBoard over a Gloo group of its own."""

    def __init__(
        self, group: TorchDistributedGroup, board: dist.ProcessGroup, dp_rank: int, dp_size: int
    ) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._group, self._board = group, board
        self._woken = threading.Event()

    def exchange(self, record: StepRecord) -> tuple[StepRecord, ...]:
        """Post this rank's next record and return the records all ranks posted in that turn."""
        own = torch.tensor([record.to_words()], dtype=torch.int64)
        out = own.new_empty(self.dp_size, RECORD_WORDS)
        with self._group.waiting(f"record of step {record.step_id}"):
            _all_gather(out, own, self._board)
        return tuple(StepRecord.from_words(words) for words in out.tolist())

    def idle(self, timeout_s: float) -> None:
        """Sleep until `wake`, or for some milliseconds: then the ranks agree again."""
        self._group.check()
        self._woken.wait(min(timeout_s, _IDLE_S))
        self._woken.clear()
        self._group.check()

    def wake(self) -> None:
        """End this rank's current or next `idle`; callable from any thread."""
        self._woken.set()

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank with CollectiveAborted; callable from any thread."""
        self._group.abort(self.dp_rank, reason)

    def close(self) -> None:
        """Close the whole group of this rank; callable more than once."""
        self._group.close()
