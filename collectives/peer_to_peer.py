"""Row collectives between GPUs of one host: kernels that write into the peers' memory.

Counts, barriers and records go over another group; only rows travel here. Both collectives can be
captured in CUDA graphs, and uneven counts cost nothing extra.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collectives.peer_kernels import MAX_BLOCKS, gather_kernel, reduce_scatter_kernel
from collectives.peer_memory import PeerMemory, close_address, open_handle
from collectives.rows import check_gather, check_reduce_scatter
from dp_runtime.errors import CollectiveTimeout
from dp_runtime.protocols import Counts, RowCollective

LEAST_BYTES = 1 << 20
BLOCK_BYTES = 8192  # that a program moves at a time
MAX_UNEVEN = 4096  # layouts of counts that are remembered

ExchangeHandles = Callable[[bytes], Sequence[bytes]]  # own handle -> all ranks', in rank order


@dataclass(frozen=True, eq=False)
class _Shared:
    """Memory of every rank, mapped here."""

    memory: PeerMemory
    addresses: tuple[int, ...]  # [rank], this rank's own among them
    pointers: Tensor  # [dp_size] int64 on the device

    @classmethod
    def make(cls, num_bytes: int, rank: int, exchange: ExchangeHandles) -> _Shared:
        memory = PeerMemory(num_bytes)
        handles = exchange(memory.handle)
        addresses = tuple(
            memory.address if peer == rank else open_handle(handle)
            for peer, handle in enumerate(handles)
        )
        return cls(memory, addresses, torch.tensor(addresses, dtype=torch.int64, device="cuda"))

    def close(self) -> None:
        """Unmap the peers' memory; the own one is freed once no peer has it mapped."""
        for address in self.addresses:
            if address != self.memory.address:
                close_address(address)


@dataclass(frozen=True, eq=False)
class _Signals:
    """One operation's flags, and the device's count of its calls."""

    flags: _Shared
    calls: Tensor  # [MAX_BLOCKS] int32

    @classmethod
    def make(cls, size: int, rank: int, exchange: ExchangeHandles) -> _Signals:
        flags = _Shared.make(MAX_BLOCKS * size * 4, rank, exchange)
        return cls(flags, torch.zeros(MAX_BLOCKS, dtype=torch.int32, device="cuda"))

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        own = self.flags.memory.view(0, (self.flags.memory.num_bytes // 4,), torch.int32)
        return self.flags.pointers, own, self.calls


class PeerToPeerCollective:
    """RowCollective of GPU ranks on one host; sums in float32 in the order of the ranks.

    control: moves counts and barriers. exchange: brings a handle of every rank to all of them.
    Gathered rows are valid until the next gather, scattered ones until the caller drops them. A
    gather and a reduce-scatter must alternate, as they do in MoE stages: each tells the ranks that
    the buffers of the other may be written again. Buffers grow with the largest call, all ranks
    together; a graph must not be captured over a call that was not made before at that size.
    """

    def __init__(self, control: RowCollective, exchange: ExchangeHandles, timeout_s: float) -> None:
        self.dp_rank, self.dp_size = control.dp_rank, control.dp_size
        self._control = control
        self._exchange = exchange
        self._timeout_s = timeout_s
        self._stop = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._failed = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=True)
        self._side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._closing = threading.Lock()
        self._gather = _Signals.make(self.dp_size, self.dp_rank, exchange)
        self._scatter = _Signals.make(self.dp_size, self.dp_rank, exchange)
        self._gathered: _Shared | None = None
        self._scattered: _Shared | None = None
        self._starts: dict[Counts, Tensor] = {}
        self._captured: dict[Counts, Tensor] = {}

    @property
    def waited_s(self) -> float:
        """Seconds the host waited for peers; the device's waits are in its own timeline."""
        return self._control.waited_s

    def check(self) -> None:
        """Raise if a wait on the device has ended without its peers."""
        if self._failed.item():
            raise CollectiveTimeout(
                f"rank {self.dp_rank}: a peer's rows did not come within {self._timeout_s:g} s"
            )

    def counts(self, values: Sequence[int]) -> tuple[Counts, ...]:
        """All ranks' values (equally many on each rank), [rank][value]."""
        return self._control.counts(values)

    def gather_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Own rows [counts[dp_rank], hidden] -> all ranks' rows [sum(counts), hidden]."""
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        total, row_bytes = sum(counts), rows.shape[1:].numel() * rows.dtype.itemsize
        if total == 0 or self.dp_size == 1:
            return rows
        self.check()
        self._gathered = self._grown(self._gathered, total * row_bytes)
        assert row_bytes % 16 == 0, f"rows of {row_bytes} bytes, not a multiple of 16"
        words = rows.contiguous().view(torch.int32)
        gather_kernel[(_programs(max(counts) * row_bytes),)](
            words, self._starts_of(counts), row_bytes // 4, self._gathered.pointers,
            *self._gather.arguments(), self._stop, self._failed, self.dp_rank, self._timeout_ns,
            SIZE=self.dp_size, BLOCK=BLOCK_BYTES // 4, num_warps=8,
        )  # fmt: skip
        return self._gathered.memory.view(0, (total, *rows.shape[1:]), rows.dtype)

    def reduce_scatter_rows(self, rows: Tensor, counts: Counts) -> Tensor:
        """Partial sums [sum(counts), hidden] -> own rows [counts[dp_rank], hidden], summed."""
        check_reduce_scatter(rows, counts, self.dp_size)
        if rows.numel() == 0 or self.dp_size == 1:
            return rows
        self.check()
        rows = rows.contiguous()
        row_size = rows.numel() // rows.shape[0]
        slot_size = max(counts) * row_size
        self._scattered = self._grown(
            self._scattered, self.dp_size * slot_size * rows.dtype.itemsize
        )
        slots = self._scattered.memory.view(0, (self.dp_size * slot_size,), rows.dtype)
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        reduce_scatter_kernel[(_programs(slot_size * rows.dtype.itemsize),)](
            rows, out, self._starts_of(counts), row_size, slot_size, slots,
            self._scattered.pointers, *self._scatter.arguments(), self._stop, self._failed,
            self.dp_rank, self._timeout_ns, SIZE=self.dp_size,
            BLOCK=BLOCK_BYTES // rows.dtype.itemsize, num_warps=8,
        )  # fmt: skip
        return out

    def barrier(self) -> None:
        """Return once all ranks have called it."""
        self._control.barrier()

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank; callable from any thread."""
        self.release()
        self._control.abort(reason)

    def release(self) -> None:
        """Let the kernels that wait for a peer end; what they return is not valid."""
        with torch.cuda.stream(self._side):
            self._stop.copy_(self._one, non_blocking=True)

    def close(self) -> None:
        """Unmap the peers' memory; callable more than once."""
        if self._closing.acquire(blocking=False):
            self.release()
            torch.cuda.synchronize()
            shared = (self._gathered, self._scattered, self._gather.flags, self._scatter.flags)
            for one in shared:
                if one is not None:
                    one.close()
        self._control.close()

    @property
    def _timeout_ns(self) -> int:
        return int(self._timeout_s * 1e9)

    def _grown(self, shared: _Shared | None, num_bytes: int) -> _Shared:
        """Memory of at least num_bytes on every rank; all ranks ask for the same."""
        if shared is not None and shared.memory.num_bytes >= num_bytes:
            return shared
        capturing = torch.cuda.is_current_stream_capturing()
        assert not capturing, f"a graph is captured over {num_bytes} bytes that were never used"
        torch.cuda.synchronize()
        if shared is not None:
            shared.close()
            self._control.barrier()
            shared.memory.free()
        size = max(LEAST_BYTES, 1 << (num_bytes - 1).bit_length())
        return _Shared.make(size, self.dp_rank, self._exchange)

    def _starts_of(self, counts: Counts) -> Tensor:
        """Where every rank's rows begin, and their sum, [dp_size + 1] int32 on the device."""
        known = self._captured.get(counts)
        if known is None:
            known = self._starts.get(counts)
        if known is None:
            if len(self._starts) >= MAX_UNEVEN:
                self._starts.clear()
            starts = [sum(counts[:rank]) for rank in range(len(counts) + 1)]
            host = torch.tensor(starts, dtype=torch.int32).pin_memory()
            known = self._starts[counts] = host.to("cuda", non_blocking=True)
        if torch.cuda.is_current_stream_capturing():
            self._captured[counts] = known  # lives as long as its graphs
        return known


def _programs(num_bytes: int) -> int:
    """Programs for the largest rank's bytes; equal on all ranks, for their flags meet."""
    return min(-(-num_bytes // BLOCK_BYTES), MAX_BLOCKS)
