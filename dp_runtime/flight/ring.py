"""FlightRing: memory in which a rank notes what it does, readable whatever becomes of the rank.

Layout, all int64 but for texts: head, rank, epoch, now, error, steps [NUM_STEPS], collectives
[NUM_STEPS * max_collectives]. A step: begun, record and time, marks, times of passes, agreement,
plans of passes with the ranks' real rows.
"""

from __future__ import annotations

import mmap
import os
import secrets
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from struct import Struct
from time import perf_counter_ns, time_ns

from dp_runtime.host.memory_address import MemoryAddress
from dp_runtime.parallel.agreement import RECORD_WORDS

NUM_STEPS = 512
MAGIC = b"dpflight"
HEAD = Struct("=8s3q")  # MAGIC, dp_size, max_passes, max_collectives
RANK = Struct("=2q64s")  # dp_rank, pid, host
CLOCK = Struct("=q")  # the wall clock minus the host's monotonic one, nanoseconds
EPOCH = Struct("=q32s")  # epoch, transport
NOW = Struct("=4q")  # phase, turn, pass, since
ERROR = Struct("=q2048s")  # when, text
BEGUN = Struct("=4q")  # turn, epoch, step id, when
POSTED = Struct(f"={RECORD_WORDS + 1}q")  # the record's words, when
MARK = Struct("=q")  # a time
PASS_TIMES = Struct("=3q")  # begun, ended, number of its first collective
COLLECTIVE = Struct("=8q")  # turn, number, kind, pass, rows, bytes of a row, entered, left

RANK_AT = HEAD.size
CLOCK_AT = RANK_AT + RANK.size
EPOCH_AT = CLOCK_AT + CLOCK.size
NOW_AT = EPOCH_AT + EPOCH.size
ERROR_AT = NOW_AT + NOW.size
STEPS_AT = ERROR_AT + ERROR.size

POSTED_AT = BEGUN.size  # in a step
SAMPLED_AT = POSTED_AT + POSTED.size
COMMITTING_AT = SAMPLED_AT + MARK.size
COMMITTED_AT = COMMITTING_AT + MARK.size
PASSES_AT = COMMITTED_AT + MARK.size
LEFT_AT = COLLECTIVE.size - MARK.size  # in a collective


@dataclass(frozen=True)
class RingLayout:
    dp_size: int
    max_passes: int
    max_collectives: int  # of a step, launched from the host

    @cached_property
    def agreed_at(self) -> int:  # in a step
        return PASSES_AT + self.max_passes * PASS_TIMES.size

    @cached_property
    def step_bytes(self) -> int:
        return self.agreed_at + self.agreed(self.max_passes).size

    @cached_property
    def collectives_at(self) -> int:
        return STEPS_AT + NUM_STEPS * self.step_bytes

    @cached_property
    def num_collectives(self) -> int:
        return NUM_STEPS * self.max_collectives

    @cached_property
    def total_bytes(self) -> int:
        return self.collectives_at + self.num_collectives * COLLECTIVE.size

    def agreed(self, num_passes: int) -> Struct:
        """When, outcome, next program, passes; of each: kind, mode, gathered rows, real rows."""
        return Struct(f"={4 + num_passes * (3 + self.dp_size)}q")

    def step(self, turn: int) -> int:
        return STEPS_AT + turn % NUM_STEPS * self.step_bytes

    def collective(self, number: int) -> int:
        return self.collectives_at + number % self.num_collectives * COLLECTIVE.size


@dataclass(frozen=True, eq=False)
class FlightRing:
    layout: RingLayout
    dp_rank: int
    memory: mmap.mmap
    address: MemoryAddress | None  # of a ring that other processes can map

    @classmethod
    def in_process(cls, layout: RingLayout, dp_rank: int) -> FlightRing:
        ring = cls(layout, dp_rank, mmap.mmap(-1, layout.total_bytes), None)
        ring._write_head()
        return ring

    @classmethod
    def shared(cls, layout: RingLayout, dp_rank: int) -> FlightRing:
        """Make a ring that outlives its process where another maps it; Linux only."""
        if sys.platform != "linux":
            return cls.in_process(layout, dp_rank)
        name = f"dp-flight-{secrets.token_hex(8)}"
        descriptor = os.memfd_create(name)
        os.ftruncate(descriptor, layout.total_bytes)
        address = MemoryAddress.of(descriptor, name)
        ring = cls(layout, dp_rank, mmap.mmap(descriptor, layout.total_bytes), address)
        ring._write_head()
        return ring

    def snapshot(self) -> bytes:
        """Copy the ring; callable from any thread, while its owner writes."""
        return bytes(self.memory)

    def close(self) -> None:
        """Let go of it, for its rank writes another; who maps it may go on to."""
        if self.address is not None:
            os.close(self.address.descriptor)

    def set_clock(self) -> None:
        CLOCK.pack_into(self.memory, CLOCK_AT, wall_offset_ns())

    def _write_head(self) -> None:
        layout = self.layout
        HEAD.pack_into(
            self.memory, 0, MAGIC, layout.dp_size, layout.max_passes, layout.max_collectives
        )
        host = socket.gethostname().encode()[: RANK.size - 16]
        RANK.pack_into(self.memory, RANK_AT, self.dp_rank, os.getpid(), host)
        self.set_clock()


def wall_offset_ns(
    clock: Callable[[], int] = perf_counter_ns, wall: Callable[[], int] = time_ns
) -> int:
    """Return the wall clock minus the host's monotonic clock, which all its processes share."""
    readings = [(clock(), wall(), clock()) for _ in range(5)]
    before, at, after = min(readings, key=lambda reading: reading[2] - reading[0])
    return at - (before + after) // 2
