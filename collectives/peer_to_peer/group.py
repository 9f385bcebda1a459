"""Ranks of one host that own GPUs: rows go from GPU to GPU, all else through shared memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from collectives.member import Group, GroupMember
from collectives.peer_to_peer.rows import GroupEnds, PeerRows, RowLayout
from collectives.rows import check_gather, check_reduce_scatter
from collectives.shared_memory.group import SharedMemoryGroup
from dp_runtime.core.membership import Membership
from dp_runtime.parallel.collective import Counts, RowCollective
from dp_runtime.parallel.step_board import StepBoard

LEAVE_S = 2.0  # for the device to end, where nothing has failed


class PeerToPeerGroup:
    """One rank's end of a group of GPU ranks on one host, over a SharedMemoryGroup."""

    def __init__(
        self,
        path: str,
        dp_rank: int,
        dp_size: int,
        timeout_s: float,
        device: torch.device,
        attach_timeout_s: float = 60.0,
        members: Membership | None = None,  # their names, for texts
    ) -> None:
        self._failure: RuntimeError | None = None
        self._host = SharedMemoryGroup(
            path, dp_rank, dp_size, timeout_s, attach_timeout_s=attach_timeout_s, members=members
        )
        try:
            name = (members or Membership.first(dp_size)).dp_ranks[dp_rank]
            ends = GroupEnds(self.raise_if_failed, self._fail, self._all_gather_bytes, name)
            self._rows = PeerRows(ends, dp_rank, dp_size, device, timeout_s)
        except BaseException as error:
            self._host.abort(f"{type(error).__name__}: {error}")
            self._host.close()
            raise
        self.collective = PeerToPeerCollective(self, self._host.collective, self._rows)

    @property
    def board(self) -> StepBoard:
        return self._host.board

    def raise_if_failed(self) -> None:
        if self._failure is not None:
            raise type(self._failure)(*self._failure.args)
        self._host.raise_if_failed()

    def _all_gather_bytes(self, own: bytes) -> Sequence[bytes]:
        row = torch.frombuffer(bytearray(own), dtype=torch.uint8)[None]
        ranks = self._host.collective.dp_size
        return [bytes(row.tolist()) for row in self._host.collective.all_gather(row, (1,) * ranks)]

    def _fail(self, error: RuntimeError) -> None:
        self._failure = self._failure or error
        self._host.abort(f"{type(error).__name__}: {error}")
        self._rows.abort()

    def abort(self, reason: str) -> None:
        """Free every waiter of every rank; peers' devices hear of it soon after."""
        self._host.abort(reason)
        self._rows.abort()

    def close(self) -> None:
        try:
            if self._failure is None:
                self._rows.drain(LEAVE_S)
            self._rows.close()
        finally:
            self._host.close()


class PeerToPeerCollective(GroupMember):
    """DeviceCountCollective whose rows never leave the GPUs; half types are summed in float32."""

    def __init__(self, group: Group, host: RowCollective, rows: PeerRows) -> None:
        super().__init__(group, host.dp_rank, host.dp_size)
        self._host, self._rows = host, rows

    @property
    def waited_s(self) -> float:
        return self._host.waited_s

    def all_gather_ints(self, values: Sequence[int]) -> tuple[Counts, ...]:
        self.raise_if_failed()
        return self._host.all_gather_ints(values)

    def all_gather(self, rows: Tensor, counts: Counts) -> Tensor:
        check_gather(rows, counts, self.dp_rank, self.dp_size)
        if self.dp_size == 1 or sum(counts) == 0:
            return rows.contiguous()
        return self._rows.gather(rows.contiguous(), self._rows.layout(counts))

    def reduce_scatter(self, rows: Tensor, counts: Counts) -> Tensor:
        check_reduce_scatter(rows, counts, self.dp_size)
        if self.dp_size == 1 or sum(counts) == 0:
            return rows.contiguous()
        out = rows.new_empty(counts[self.dp_rank], *rows.shape[1:])
        self._rows.reduce_scatter(rows.contiguous(), self._rows.layout(counts), out)
        return out

    def reserve(self, rows_per_rank: int, row_bytes: int) -> None:
        self._rows.reserve(self.dp_size * rows_per_rank * row_bytes)

    def all_gather_v(
        self, rows: Tensor, row_ranges: Tensor, total_rows: int, most_rows: int, poison: bool
    ) -> Tensor:
        counted = self._counted(row_ranges, total_rows, len(rows), most_rows)
        return self._rows.gather(rows.contiguous(), counted, poison)

    def reduce_scatter_v(
        self, partial: Tensor, row_ranges: Tensor, out: Tensor, most_rows: int
    ) -> None:
        counted = self._counted(row_ranges, len(partial), len(out), most_rows)
        self._rows.reduce_scatter(partial.contiguous(), counted, out)

    def _counted(
        self, row_ranges: Tensor, total_rows: int, own_rows: int, most_rows: int
    ) -> RowLayout:
        assert row_ranges.shape == (2, self.dp_size), (
            f"row_ranges {list(row_ranges.shape)} is [2, dp_size]"
        )
        assert own_rows <= most_rows <= total_rows, (
            f"{own_rows} own rows, {most_rows} of a rank, {total_rows} in all"
        )
        return RowLayout(row_ranges, total_rows, most_rows)

    def barrier(self) -> None:
        self.raise_if_failed()
        self._host.barrier()

    def arm_watchdog(self, what: str) -> None:
        self._rows.arm_watchdog(what)
