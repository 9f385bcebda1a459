"""MemoryAddress: where the processes of a host find memory without a name in any directory."""

from __future__ import annotations

import mmap
import os
import socket
import stat
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryAddress:
    """A memfd by the process that keeps it open; its name tells it from another's."""

    host: str
    pid: int
    descriptor: int
    name: str

    @classmethod
    def of(cls, descriptor: int, name: str) -> MemoryAddress:
        """Return the address of a memfd of this process."""
        return cls(socket.gethostname(), os.getpid(), descriptor, name)

    def open(self, flags: int = os.O_RDWR) -> int | None:
        """Return a descriptor; None where the memory can't be reached from this process."""
        path = f"/proc/{self.pid}/fd/{self.descriptor}"
        if self.host != socket.gethostname():
            return None
        try:
            if self.name not in os.readlink(path):  # another machine or container
                return None
            return os.open(path, flags)
        except OSError:
            return None

    def map(self) -> mmap.mmap | None:
        """Map it for reading; None where it can't be reached, or is empty."""
        descriptor = self.open(os.O_RDONLY | os.O_NONBLOCK)
        if descriptor is None:
            return None
        try:
            found = os.fstat(descriptor)
            usable = stat.S_ISREG(found.st_mode) and found.st_size > 0
            return mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) if usable else None
        finally:
            os.close(descriptor)
