"""Doorbell: ranks of one host tell each other that they have published, by a named FIFO each."""

from __future__ import annotations

import math
import os
import select
import struct
from collections.abc import Sequence
from contextlib import suppress

_MESSAGE = struct.Struct("=qq")  # sender, its newest turn; far below PIPE_BUF, hence atomic
_NO_NEWS = 0


class Doorbell:
    """Rings the peers' FIFOs, which never fill (docs/collectives.md), and listens on its own."""

    def __init__(self, fifos: Sequence[int], dp_rank: int) -> None:
        self._rank = dp_rank
        self._fifos = list(fifos)
        self._peers = [fd for rank, fd in enumerate(fifos) if rank != dp_rank]
        self._poll = select.poll()
        self._poll.register(self._fifos[dp_rank], select.POLLIN)
        self._heard = [0] * len(self._fifos)

    def ring(self, turn: int) -> None:
        self._heard[self._rank] = turn
        message = _MESSAGE.pack(self._rank, turn)
        for fd in self._peers:
            os.write(fd, message)

    def rouse(self) -> None:
        """End this rank's own current or next `listen`; callable from any thread."""
        self._nudge(self._fifos[self._rank])

    def alarm(self) -> None:
        for fd in self._fifos:
            self._nudge(fd)

    def listen(self, timeout_s: float) -> None:
        """Sleep until somebody rings, for timeout_s at most, and take in what was said."""
        if self._poll.poll(math.ceil(max(timeout_s, 0.0) * 1000)):
            for sender, turn in _MESSAGE.iter_unpack(os.read(self._fifos[self._rank], 4096)):
                self._heard[sender] = max(self._heard[sender], turn)

    def missing(self, turn: int) -> list[int]:
        return [rank for rank, heard in enumerate(self._heard) if heard < turn]

    def newest_turn(self) -> int:
        return max(self._heard)

    def close(self) -> None:
        """Close the FIFOs; no other thread may be listening or ringing."""
        for fd in self._fifos:
            os.close(fd)
        self._fifos, self._peers = [], []

    def _nudge(self, fd: int) -> None:
        with suppress(BlockingIOError):  # a full FIFO is readable: its owner wakes anyway
            os.write(fd, _MESSAGE.pack(self._rank, _NO_NEWS))
