"""Memory of all ranks of a host that each of them has mapped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from collectives.peer_to_peer.kernels import LINE, MAX_PROGRAMS
from collectives.peer_to_peer.memory import PeerMemory, close_address, open_handle

MIN_BYTES = 1 << 20
AllGatherBytes = Callable[[bytes], Sequence[bytes]]  # equally many of every rank, in rank order


@dataclass(frozen=True, eq=False)
class Shared:
    memory: PeerMemory
    addresses: tuple[int, ...]  # [rank], this rank's own among them
    pointers: Tensor  # [dp_size] int64 on the device

    @classmethod
    def make(cls, num_bytes: int, rank: int, all_gather_bytes: AllGatherBytes) -> Shared:
        memory = PeerMemory(num_bytes)
        addresses = tuple(
            memory.address if peer == rank else open_handle(handle)
            for peer, handle in enumerate(all_gather_bytes(memory.handle))
        )
        return cls(memory, addresses, torch.tensor(addresses, dtype=torch.int64, device="cuda"))

    def unmap(self) -> None:
        """Close the peers' memory; the own one may be freed once all peers have done so."""
        for address in self.addresses:
            if address != self.memory.address:
                close_address(address)


@dataclass(frozen=True, eq=False)
class Signals:
    """One operation's flags, and how many of them the device has waited for."""

    flags: Shared  # [MAX_PROGRAMS, LINE] int32 on every rank
    heard: Tensor  # [MAX_PROGRAMS, LINE] int32

    @classmethod
    def make(cls, rank: int, all_gather_bytes: AllGatherBytes) -> Signals:
        flags = Shared.make(MAX_PROGRAMS * LINE.value * 4, rank, all_gather_bytes)
        return cls(flags, torch.zeros(MAX_PROGRAMS, LINE.value, dtype=torch.int32, device="cuda"))

    def arguments(self) -> tuple[Tensor, Tensor, Tensor]:
        own = self.flags.memory.view(0, (self.flags.memory.num_bytes // 4,), torch.int32)
        return self.flags.pointers, own, self.heard


class PeerBuffer:
    """Memory of every rank for one of the two operations; all ranks grow theirs together."""

    def __init__(self, rank: int, all_gather_bytes: AllGatherBytes) -> None:
        self._rank, self._all_gather_bytes = rank, all_gather_bytes
        self._shared: Shared | None = None
        self._in_graphs = False
        self._outgrown: list[Shared] = []  # graphs write to them

    def reserve(self, num_bytes: int) -> Shared:
        """Return memory of at least num_bytes on every rank; all ranks ask for the same."""
        num_bytes = max(num_bytes, 1)
        capturing = torch.cuda.is_current_stream_capturing()
        assert not (capturing and self._outgrown), "other graphs write to the memory before"
        self._in_graphs |= capturing
        old = self._shared
        if old is not None and old.memory.num_bytes >= num_bytes:
            return old
        assert not capturing, f"a graph is captured over {num_bytes} bytes that were never used"
        torch.cuda.synchronize()
        self._shared = None
        if old is not None and self._in_graphs:
            self._outgrown.append(old)
        elif old is not None:
            old.unmap()
            self._all_gather_bytes(b"unmapped")  # no rank frees what another has mapped
            old.memory.free()
        self._shared = Shared.make(_buffer_bytes(num_bytes), self._rank, self._all_gather_bytes)
        return self._shared

    def unmap(self) -> None:
        for shared in (self._shared, *self._outgrown):
            if shared is not None:
                shared.unmap()


def _buffer_bytes(num_bytes: int) -> int:
    """A power of two, so that buffers grow seldom."""
    return max(MIN_BYTES, power_of_two(num_bytes))


def power_of_two(minimum: int) -> int:
    return 1 << (minimum - 1).bit_length()
