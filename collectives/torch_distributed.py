"""Row collectives and a step board over torch.distributed, for ranks of several hosts or GPUs.

The backends are made directly and not through `init_process_group`: there is one world per
process, and a process that has aborted a group must be able to join the next one at once, while
Gloo can take until its timeout to give up the operations of the old one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from collectives.alarm import AlarmLine, own_address
from collectives.rows import check_gather, check_reduce_scatter, split, summing_dtype
from dp_runtime.agreement import RECORD_WORDS, StepRecord
from dp_runtime.errors import CollectiveAborted, CollectiveTimeout, StartError, require
from dp_runtime.protocols import Counts

_CPU = torch.device("cpu")
_IDLE_S = 0.003  # ranks that idle keep meeting, since a peer's post can not wake them
_LOOK_EVERY_S = 0.05  # how soon a waiter sees an abort: Gloo can not be interrupted
_SLACK_S = 1.0  # by which Gloo's own timeout is later than ours


class TorchDistributedGroup:
    """One rank's end of a torch.distributed group.

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
        self._timeout_s = timeout_s
        self._failure: str | None = None  # why this group can not be used any more
        self._lock = threading.Lock()
        self._backends: dict[str, Any] = {}
        self._undertaker: threading.Thread | None = None
        store = self._meet(init_method, dp_rank, dp_size, attach_timeout_s)
        place = (dp_rank, dp_size, timedelta(seconds=timeout_s + _SLACK_S))
        for name in ("control", "board"):
            self._backends[name] = dist.ProcessGroupGloo(PrefixStore(name, store), *place)
        if backend == "nccl":
            self._backends["rows"] = _nccl(PrefixStore("rows", store), *place, device)
        self._rows = "rows" if backend == "nccl" else "control"
        self.collective = TorchDistributedCollective(self, self._rows, dp_rank, dp_size)
        self.board = TorchDistributedBoard(self, dp_rank, dp_size)

    def check(self) -> None:
        """Raise CollectiveAborted if this group can not be used any more."""
        if self._failure is not None:
            raise CollectiveAborted(self._failure)

    def run(self, what: str, backend: str, start: Callable[[Any], Sequence[Any]]) -> None:
        """Start operations on a backend and wait for them together, timeout_s at most."""
        deadline = time.monotonic() + self._timeout_s
        # Under the lock, so that the backend's last reference is never dropped here: its
        # destructor waits for its operations.
        with self._lock:
            self.check()
            works = start(self._backends[backend])
        for work in works:
            if backend == "rows":  # NCCL: ordered by the device's stream, the host does not wait
                work.wait()
            else:
                self._wait(work, what, deadline)

    def abort(self, dp_rank: int, reason: str) -> None:
        """Free every waiter of every rank; the first reason stays."""
        if self._failure is None:
            text = f"aborted by rank {dp_rank}: {reason}"
            self._alarm.sound(text)
            self._end(text)

    def close(self) -> None:
        """Leave the group; this rank's own waiters are freed, peers are not told."""
        self._end("this rank has closed its group")
        assert self._undertaker is not None, "the end of a group starts its undertaker"
        self._undertaker.join(_SLACK_S)
        self._alarm.close()

    def _meet(self, init_method: str, dp_rank: int, dp_size: int, timeout_s: float) -> Store:
        try:
            wait = timedelta(seconds=timeout_s)
            store: Store = next(rendezvous(init_method, dp_rank, dp_size, timeout=wait))[0]
            address = own_address(init_method)
            self._alarm = AlarmLine(store, dp_rank, dp_size, address, timeout_s, self._end)
        except (OSError, RuntimeError) as error:
            raise StartError(
                f"rank {dp_rank} of {dp_size} could not meet the others at {init_method} "
                f"within {timeout_s:g} s: {error}"
            ) from error
        return store

    def _wait(self, work: Any, what: str, deadline: float) -> None:
        while True:
            left, ended = deadline - time.monotonic(), work.is_completed()
            try:
                work.wait(timedelta(seconds=min(_LOOK_EVERY_S, max(left, 0.001))))
                return
            except RuntimeError as error:  # the backend's, or only that this look has ended
                self.check()
                if ended:
                    self._lose(what, error)
                if left <= 0:
                    message = f"{what}: a peer did not come within {self._timeout_s:g} s"
                    self._failure = f"timed out before ({message})"
                    raise CollectiveTimeout(message) from error

    def _lose(self, what: str, error: RuntimeError) -> None:
        """Report what the backend says, or the abort that is behind it.

        A peer that aborts closes its connections, and its alarm may be a moment later.
        """
        deadline = time.monotonic() + _SLACK_S
        while self._failure is None and time.monotonic() < deadline:
            time.sleep(_LOOK_EVERY_S)
        self._failure = self._failure or f"{what} failed: {error}"
        raise CollectiveAborted(self._failure) from error

    def _end(self, reason: str) -> None:
        """Free this rank's waiters and leave the backends to a thread that may take its time."""
        self._failure = self._failure or reason
        with self._lock:
            if self._undertaker is not None:
                return
            backends, self._backends = self._backends, {}
            self._undertaker = threading.Thread(target=_bury, args=(backends,), daemon=True)
            self._undertaker.start()


def _bury(backends: dict[str, Any]) -> None:
    if "rows" in backends:
        backends["rows"].abort()  # NCCL: ends its kernels, also those that wait for a peer
    backends.clear()


def _nccl(
    store: Store, dp_rank: int, dp_size: int, timeout: timedelta, device: torch.device
) -> Any:
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, dp_rank, dp_size, options)


class TorchDistributedCollective:
    """RowCollective over a torch.distributed group.

    Gloo sums half types in float32, NCCL as it does; the order of the ranks is the backend's.
    """

    def __init__(
        self,
        group: TorchDistributedGroup,
        rows_backend: str,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._group, self._rows_backend = group, rows_backend
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds spent in calls of the backend: it does not tell waiting from moving."""
        return self._waited_s

    def counts(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """All ranks' values (equally many on each rank), [rank][value]."""
        own = torch.tensor([list(values)], dtype=torch.int64)
        out = own.new_empty(self.dp_size, own.shape[1])
        self._run("counts", "control", lambda b: [b._allgather_base(out, own)])
        return tuple(tuple(row) for row in out.tolist())

    def gather_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Own rows [counts[dp_rank], hidden] -> all ranks' rows [sum(counts), hidden]."""
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        out = rows.new_empty(sum(counts), *rows.shape[1:])
        if out.numel() == 0:
            return out
        rows = rows.contiguous()
        if len(set(counts)) == 1:
            self._run_rows("gather_rows", lambda b: [b._allgather_base(out, rows)])
            return out
        parts = split(out, counts)  # all-gathers take equal sizes only: a broadcast per rank
        parts[self.dp_rank].copy_(rows)
        roots = [rank for rank, count in enumerate(counts) if count]
        self._run_rows("gather_rows", lambda b: [b.broadcast(parts[r], r) for r in roots])
        return out

    def reduce_scatter_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Partial sums [sum(counts), hidden] -> own rows [counts[dp_rank], hidden], summed."""
        check_reduce_scatter(rows, counts, self.dp_size)
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        if rows.numel() == 0:
            return out
        if self._rows_backend == "control":
            # Gloo's reduce_scatter is an all-reduce inside, and its wait can not be bounded.
            total = rows.to(summing_dtype(rows.dtype), copy=True).contiguous()
            self._run_rows("reduce_scatter_rows", lambda b: [b.allreduce(total)])
            return out.copy_(split(total, counts)[self.dp_rank])
        rows = rows.contiguous()
        if len(set(counts)) == 1:
            self._run_rows("reduce_scatter_rows", lambda b: [b._reduce_scatter_base(out, rows)])
            return out
        parts = list(split(rows, counts))
        self._run_rows("reduce_scatter_rows", lambda b: [b.reduce_scatter(out, parts)])
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

    def _run_rows(self, what: str, start: Callable[[Any], Sequence[Any]]) -> None:
        self._run(what, self._rows_backend, start)

    def _run(self, what: str, backend: str, start: Callable[[Any], Sequence[Any]]) -> None:
        before = time.monotonic()
        try:
            self._group.run(what, backend, start)
        finally:
            self._waited_s += time.monotonic() - before


class TorchDistributedBoard:
    """StepBoard over a Gloo group of its own."""

    def __init__(self, group: TorchDistributedGroup, dp_rank: int, dp_size: int) -> None:
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self._group = group
        self._woken = threading.Event()
        self._waited_s = 0.0

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for peers' records."""
        return self._waited_s

    def exchange(self, record: StepRecord) -> tuple[StepRecord, ...]:
        """Post this rank's next record and return the records all ranks posted in that turn."""
        own = torch.tensor([record.to_words()], dtype=torch.int64)
        out = own.new_empty(self.dp_size, RECORD_WORDS)
        what = f"record of step {record.step_id}"
        before = time.monotonic()
        self._group.run(what, "board", lambda board: [board._allgather_base(out, own)])
        self._waited_s += time.monotonic() - before
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
