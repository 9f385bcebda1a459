"""Row collectives and a step board for ranks of one host, over memory that all of them map."""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from collectives.member import Group, GroupMember
from collectives.rows import check_gather, check_reduce_scatter, cut, split, sum_in_rank_order
from collectives.session import session_token
from collectives.shared_memory.board import SharedMemoryBoard
from collectives.shared_memory.channel import CLOSED, Channel
from collectives.shared_memory.region import RegionLayout
from collectives.shared_memory.rendezvous import CHANNELS, MeetingDirectory
from dp_runtime.core.membership import Membership
from dp_runtime.errors import CollectiveAborted, require
from dp_runtime.parallel.agreement import StepRecord
from dp_runtime.parallel.collective import Counts

AREA_BYTES = 1 << 20


def shared_root() -> str:
    """Return where groups of this host meet: in memory where the system has /dev/shm."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def new_rendezvous_path(root: str | None = None) -> str:
    """Choose a path for one group, below this or another host's `root`; nothing is created."""
    return os.path.join(root or shared_root(), f"dp-runtime-{session_token()}-{uuid.uuid4().hex}")


class SharedMemoryGroup:
    """One rank's end of a group of ranks on one host; StartError names missing ranks or space.

    path: a directory that is new for every group, with room for 2 * dp_size * area_bytes.
    """

    def __init__(
        self,
        path: str,
        dp_rank: int,
        dp_size: int,
        timeout_s: float,  # of every wait of a step
        area_bytes: int = AREA_BYTES,  # rows beyond them travel in chunks
        attach_timeout_s: float = 60.0,  # of the start
        members: Membership | None = None,  # their names, for texts
    ) -> None:
        require(0 <= dp_rank < dp_size, "dp_rank", dp_rank, f"0..{dp_size - 1}")
        min_bytes = 64 * dp_size
        ok = area_bytes >= min_bytes and area_bytes % 64 == 0
        require(ok, "area_bytes", area_bytes, f"a multiple of 64, at min_bytes {min_bytes}")
        layout, members = RegionLayout(dp_size, area_bytes), members or Membership.first(dp_size)
        meeting = MeetingDirectory(path, dp_rank, layout, attach_timeout_s, members)
        region, bells = meeting.attach()
        self._name = members.dp_ranks[dp_rank]
        self._region, self._lock, self._closed = region, threading.Lock(), False
        rows, board = (Channel(region, bells[name], timeout_s, members) for name in CHANNELS)
        self._channels = (rows, board)
        self.collective = SharedMemoryCollective(self, rows, dp_rank, dp_size, area_bytes)
        self.board = SharedMemoryBoard(
            self, board, dp_rank, dp_size, partial(self._rouse, board), self._newest_record
        )

    def raise_if_failed(self) -> None:
        with self._lock:
            if self._closed:
                raise CollectiveAborted(CLOSED)
            for channel in self._channels:
                channel.raise_if_failed()

    def abort(self, reason: str) -> None:
        with self._lock:
            if self._closed or self._region.abort_reason() is not None:
                return
            self._region.post_abort(f"aborted by rank {self._name}: {reason}")
            for channel in self._channels:
                channel.bell.alarm()

    def _rouse(self, channel: Channel) -> None:
        with self._lock:
            if not self._closed:
                channel.bell.rouse()

    def _newest_record(self, dp_rank: int) -> StepRecord | None:
        with self._lock:
            if self._closed:
                raise CollectiveAborted(CLOSED)
            return self._region.newest_record(dp_rank)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            for channel in self._channels:
                channel.close()
            self._region.close()


class SharedMemoryCollective(GroupMember):
    """RowCollective over the areas of a SharedMemoryGroup; a GPU's rows pass through the host."""

    def __init__(
        self,
        group: Group,
        channel: Channel,
        dp_rank: int,
        dp_size: int,
        area_bytes: int,
    ) -> None:
        super().__init__(group, dp_rank, dp_size)
        self._channel, self._area_bytes = channel, area_bytes

    @property
    def waited_s(self) -> float:
        """Seconds this rank has spent waiting for peers; copying is not counted."""
        return self._channel.waited_s

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        own = torch.tensor([list(values)], dtype=torch.int64)
        rows = self.all_gather(own, (1,) * self.dp_size)
        return tuple(tuple(row) for row in rows.tolist())

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        if rows.is_cuda:
            return self.all_gather(rows.cpu(), counts).to(rows.device)
        out = rows.new_empty(sum(counts), *rows.shape[1:])
        sizes = [count * rows.shape[1:].numel() for count in counts]
        own, parts = rows.reshape(-1), split(out.view(-1), sizes)
        num_chunks = -(-max(sizes) // self._capacity(rows.dtype))
        with self._channel.in_use:
            self._channel.raise_if_failed()
            for chunk in range(num_chunks):
                areas = self._channel.region.areas(rows.dtype, self._channel.begin())
                piece = own[cut(len(own), chunk, num_chunks)]
                areas[self.dp_rank][: len(piece)] = piece
                self._channel.finish("all_gather")
                if num_chunks == 1:  # one call for all ranks: half the time of small copies
                    torch.cat([area[:size] for area, size in zip(areas, sizes)], out=out.view(-1))
                    break
                for part, area in zip(parts, areas):
                    piece = part[cut(len(part), chunk, num_chunks)]
                    piece.copy_(area[: len(piece)])
        return out

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        check_reduce_scatter(rows, counts, self.dp_size)
        if rows.is_cuda:
            return self.reduce_scatter(rows.cpu(), counts).to(rows.device)
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        sizes = [count * rows.shape[1:].numel() for count in counts]
        parts, own = split(rows.reshape(-1), sizes), out.view(-1)
        # Cut into n chunks, the parts need sum(ceil(size / n)) < total / n + dp_size elements.
        num_chunks = -(-rows.numel() // (self._capacity(rows.dtype) - self.dp_size))
        with self._channel.in_use:
            self._channel.raise_if_failed()
            for chunk in range(num_chunks):
                areas = self._channel.region.areas(rows.dtype, self._channel.begin())
                pieces = [part[cut(len(part), chunk, num_chunks)] for part in parts]
                start = sum(map(len, pieces[: self.dp_rank]))
                torch.cat(pieces, out=areas[self.dp_rank][: sum(map(len, pieces))])
                self._channel.finish("reduce_scatter")
                mine = slice(start, start + len(pieces[self.dp_rank]))
                total = own[cut(len(own), chunk, num_chunks)]
                sum_in_rank_order([area[mine] for area in areas], total)
        return out

    def barrier(self) -> None:
        with self._channel.in_use:
            self._channel.begin()
            self._channel.finish("barrier")

    def arm_watchdog(self, what: str) -> None:
        pass  # the host waits for every call

    def _capacity(self, dtype: torch.dtype) -> int:
        return self._area_bytes // dtype.itemsize
