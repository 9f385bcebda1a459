"""Rows between GPUs of one host, by kernels that write into the peers' memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from collectives.peer_to_peer.buffers import (
    AllGatherBytes,
    PeerBuffer,
    Shared,
    Signals,
    power_of_two,
)
from collectives.peer_to_peer.kernels import (
    LINE,
    MAX_PROGRAMS,
    gather_kernel,
    reduce_scatter_kernel,
)
from collectives.watchdog import Watchdog
from dp_runtime.core.device_copy import on_device
from dp_runtime.errors import StartError
from dp_runtime.host.capturing import not_capturing
from dp_runtime.kernels.triton_launch import overlaps
from dp_runtime.parallel.collective import Counts

TILE_BYTES = 4096  # of a row, that a program moves at a time: 16 for each of its threads
NUM_WARPS = 8
GATHER, SCATTER = range(2)
WORDS = (torch.int32, torch.int16, torch.uint8)  # rows are moved as the widest that divides them
SUMS = {torch.int32: tl.int32, torch.int64: tl.int64, torch.float64: tl.float64}  # else float32
CAPTURE_S = 1.0  # for a graph that is being captured, before the device is waited for
MAX_LAYOUTS = 4096  # counts whose offsets the device remembers


@dataclass(frozen=True)
class GroupEnds:
    """Connects the rows to their group, whose ranks meet on the host."""

    raise_if_failed: Callable[[], None]
    fail: Callable[[RuntimeError], None]
    all_gather_bytes: AllGatherBytes
    dp_rank: int  # the name of this one


@dataclass(frozen=True, eq=False)
class RowLayout:
    table: Tensor  # [2, dp_size] int32 on the device: each rank's first row, and its real rows
    total: int  # rows in all
    largest: int  # no rank has more; the same on all


class Alternation:
    """Tells whether an operation follows one of its own kind, which peers may still be reading."""

    def __init__(self) -> None:
        self._last: int | None = None

    def repeats(self, operation: int) -> bool:
        before, self._last = self._last, operation
        return before == operation


class PeerRows:
    """One rank's end of peer-to-peer collectives; StartError if it can't map its peers' memory.

    Gathered rows are valid until the next gather. Partial sums must not lie in them, for a peer may
    be writing there. Graphs are captured over memory that was reserved before: those that
    used other memory would not meet.
    """

    def __init__(
        self,
        ends: GroupEnds,
        dp_rank: int,
        dp_size: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        assert dp_size <= LINE.value, f"{dp_size} ranks, {LINE.value} flags of a program"
        torch.cuda.set_device(device)
        self._ends, self._rank, self._size = ends, dp_rank, dp_size
        self._pdl = overlaps(device)
        try:
            self._signals = [Signals.make(dp_rank, ends.all_gather_bytes) for _ in range(2)]
        except RuntimeError as error:
            raise StartError(
                f"rank {ends.dp_rank}: collective peer_to_peer can't map the other ranks' GPU "
                f"memory ({error}); use collective=torch_distributed"
            ) from error
        self._buffers = [PeerBuffer(dp_rank, ends.all_gather_bytes) for _ in range(2)]
        self._stop = torch.zeros(1, dtype=torch.int32, device=device)
        self._one = torch.ones(1, dtype=torch.int32, pin_memory=True)
        self._side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._alternation = Alternation()
        self._layouts: dict[Counts, RowLayout] = {}
        self._captured: dict[Counts, RowLayout] = {}  # live as long as their graphs
        self._aborting, self._aborted = threading.Lock(), False
        self._closed = False
        self._watch = Watchdog(timeout_s, ends.fail, ends.raise_if_failed)

    def layout(self, counts: Counts) -> RowLayout:
        known = self._captured.get(counts) or self._layouts.get(counts)
        if known is None:
            if len(self._layouts) >= MAX_LAYOUTS:
                self._layouts.clear()
            starts = np.cumsum((0, *counts[:-1]))
            table = on_device(np.array([starts, counts], np.int32), self._stop.device)
            known = self._layouts[counts] = RowLayout(table, sum(counts), max(counts))
        if torch.cuda.is_current_stream_capturing():
            self._captured[counts] = known
        return known

    def reserve(self, num_bytes: int) -> None:
        for buffer in self._buffers:
            buffer.reserve(num_bytes)

    def gather(self, rows: Tensor, layout: RowLayout, poison: bool = False) -> Tensor:
        """Return [layout.total, hidden]; rows that are not real are NaN with poison, else stale."""
        self._ends.raise_if_failed()
        self._alternate(GATHER)
        buffer = self._gather(rows, layout, poison)
        self.arm_watchdog("all_gather")
        return buffer.memory.view(0, (layout.total, *rows.shape[1:]), rows.dtype)

    def reduce_scatter(self, partial: Tensor, layout: RowLayout, out: Tensor) -> None:
        """Sum over the ranks into out [own_rows, hidden]; rows beyond the own real ones are 0."""
        assert out.is_contiguous(), "sums are written in one piece"
        assert (out.dtype, out.shape[1:]) == (partial.dtype, partial.shape[1:]), "sums are as rows"
        self._ends.raise_if_failed()
        self._alternate(SCATTER)
        self._scatter(partial, layout, out)
        self.arm_watchdog("reduce_scatter")

    def _alternate(self, operation: int) -> None:
        """Keep a rank that is ahead from writing over what a peer still reads, by an empty call."""
        if self._alternation.repeats(operation):
            none, empty = self._stop.new_empty(0, 4), self.layout((0,) * self._size)
            if operation == GATHER:
                self._scatter(none, empty, none)
            else:
                self._gather(none, empty, False)

    def _gather(self, rows: Tensor, layout: RowLayout, poison: bool) -> Shared:
        row_bytes = rows.shape[1:].numel() * rows.dtype.itemsize
        word = next(word for word in WORDS if row_bytes % word.itemsize == 0)
        buffer = self._buffers[GATHER].reserve(layout.total * row_bytes)
        row_words = row_bytes // word.itemsize
        cols, width, programs = _split(layout.largest, row_words, word.itemsize)
        gather_kernel[(programs,)](
            rows.view(-1).view(word), layout.table, layout.total, row_words, buffer.pointers,
            *self._signals[GATHER].arguments(), self._stop, self._rank,
            SIZE=self._size, RANKS=power_of_two(self._size), COLS=cols, WIDTH=width,
            POISON=poison, PDL=self._pdl, num_warps=NUM_WARPS, launch_pdl=self._pdl,
        )  # fmt: skip
        return buffer

    def _scatter(self, partial: Tensor, layout: RowLayout, out: Tensor) -> None:
        row_size, size = partial.shape[1:].numel(), partial.dtype.itemsize
        buffer = self._buffers[SCATTER].reserve(self._size * layout.largest * row_size * size)
        cols, width, programs = _split(layout.largest, row_size, size)
        reduce_scatter_kernel[(programs,)](
            partial, out, layout.table, len(out), layout.largest, row_size, buffer.pointers,
            *self._signals[SCATTER].arguments(), self._stop, self._rank,
            SIZE=self._size, RANKS=power_of_two(self._size), COLS=cols, WIDTH=width,
            SUM=SUMS.get(partial.dtype, tl.float32), PDL=self._pdl,
            num_warps=NUM_WARPS, launch_pdl=self._pdl,
        )  # fmt: skip

    def arm_watchdog(self, what: str) -> None:
        self._watch.arm(what, self._stop.device)

    def drain(self, timeout_s: float) -> None:
        self._watch.drain(timeout_s)

    def abort(self) -> None:
        """End the kernels that wait for a peer, now and later; callable from any thread."""
        with self._aborting, torch.cuda.device(self._stop.device):
            if self._aborted:
                return
            self._aborted = True
            self._watch.close()
            with torch.cuda.stream(self._side):
                self._stop.copy_(self._one, non_blocking=True)
            with not_capturing(CAPTURE_S):
                torch.cuda.synchronize(self._stop.device)

    def close(self) -> None:
        """Unmap the peers' memory; the own one stays, for a peer may not have let go of it yet."""
        self.abort()
        with self._aborting, torch.cuda.device(self._stop.device):
            if self._closed:
                return
            self._closed = True
            for buffer in self._buffers:
                buffer.unmap()
            for signals in self._signals:
                signals.flags.unmap()


def _split(rows: int, row_size: int, item_bytes: int) -> tuple[int, int, int]:
    """Return columns of a tile, tiles of a row, and programs, which all ranks must have alike."""
    cols = min(power_of_two(max(row_size, 1)), TILE_BYTES // item_bytes)
    width = -(-row_size // cols)
    return cols, width, max(1, min(rows * width, MAX_PROGRAMS))
