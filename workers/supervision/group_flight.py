"""The flight records of all ranks, also of those that hang, are stopped or have ended."""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from time import time_ns

import psutil

from dp_runtime.config import EngineConfig
from dp_runtime.errors import require
from dp_runtime.flight.dump_file import write_dump
from dp_runtime.flight.reading import read_ring
from dp_runtime.flight.record import FlightDump, ProcessState, RankFlight, Source
from dp_runtime.flight.recorder import without_foreign_text
from workers.messages import HostInfo, ReadFlight
from workers.ranks import Seat

ANSWER_S = 1.0  # for ranks whose ring can't be read from here
WRITE_S = 10.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TakenRank:
    dp_rank: int
    ring: bytes | Future[bytes]
    process: ProcessState
    silent_s: float

    def read(self) -> RankFlight:
        match self.ring:
            case bytes() as ring:
                found = read_ring(ring, Source.MEMORY)
            case Future() as answer if answer.done() and answer.exception() is None:
                found = read_ring(answer.result(), Source.ANSWER)
            case _:
                found = RankFlight(self.dp_rank, Source.NONE)
        return replace(found, process=self.process, silent_s=round(self.silent_s, 3))


@dataclass(frozen=True, eq=False)
class TakenFlight:
    """What the ranks' rings held at one moment; those that must answer may do so later."""

    reason: str
    taken_us: int
    ranks: Sequence[TakenRank]

    def read(self) -> FlightDump:
        """Wait for answers, ANSWER_S at most, and read all rings."""
        wait([rank.ring for rank in self.ranks if isinstance(rank.ring, Future)], ANSWER_S)
        ranks = tuple(rank.read() for rank in self.ranks)
        return FlightDump(self.reason, self.taken_us, ranks)


class GroupFlight:
    """Takes flight records of a group's ranks, and writes one when the group fails."""

    def __init__(self, seats: Callable[[], Sequence[Seat]], directory: str | None) -> None:
        self._seats, self._directory = seats, directory  # seats: of those that serve now
        self._maps: dict[int, mmap.mmap] = {}
        self._writers: list[threading.Thread] = []

    def map_rings(self, hosts: Mapping[int, HostInfo]) -> None:
        """Map the rings of these ranks, as far as they are processes of this host."""
        for dp_rank, host in hosts.items():
            self._maps.pop(dp_rank, None)
            if host.flight is not None and (memory := host.flight.map()) is not None:
                self._maps[dp_rank] = memory

    def take(self, reason: str, silences_s: Mapping[int, float]) -> TakenFlight:
        """Take the rings of all that serve; silences_s: by dp_rank, since the last answer."""
        reason = without_foreign_text(reason)
        ranks = [self._take(seat, silences_s.get(seat.dp_rank, 0.0)) for seat in self._seats()]
        return TakenFlight(reason, time_ns() // 1000, ranks)

    def _take(self, seat: Seat, silent_s: float) -> TakenRank:
        memory = self._maps.get(seat.dp_rank)
        ring = seat.call(ReadFlight()) if memory is None else memory[:]
        return TakenRank(seat.dp_rank, ring, _process_state(seat.host), silent_s)

    def write_later(self, taken: TakenFlight) -> None:
        """Write a file in a thread of its own, for which also the end of the program waits."""
        writer = threading.Thread(target=self._write, args=(taken,), name="flight-record")
        self._writers = [*(one for one in self._writers if one.is_alive()), writer]
        writer.start()

    def finish(self) -> None:
        """Wait for the files; no rank may be killed before, as some may still answer."""
        for writer in self._writers:
            writer.join(WRITE_S)

    def forget(self) -> None:
        self._maps.clear()  # an engine may be held for long after its ranks have ended

    def _write(self, taken: TakenFlight) -> None:
        dump = taken.read()
        if not any(rank.steps for rank in dump.ranks):
            return  # nobody has begun to step
        try:
            path = new_dump_path(self._directory)
            write_dump(dump, path)
        except OSError as error:
            _log.error("no flight record was written: %s", error)
        else:
            _log.error("flight record written to %s; `dp-runtime doctor` reads it", path)


def check_dump_directory(config: EngineConfig) -> None:
    """Make the directory of flight records, if one is set; ValueError if it is none of ours."""
    directory = config.flight_dump_dir
    if directory is None:
        return
    try:
        os.makedirs(directory, 0o700, exist_ok=True)
        writable = os.access(directory, os.W_OK | os.X_OK)
    except (OSError, ValueError):
        writable = False
    require(writable, "flight_dump_dir", directory, "a directory that this user can write to")


def new_dump_path(directory: str | None) -> Path:
    """Choose a file that does not exist; without a directory, in a new private one."""
    parent = directory or tempfile.mkdtemp(prefix="dp-runtime-flight-")
    at = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    return Path(parent, f"flight-{at}-{os.getpid()}-{secrets.token_hex(3)}.jsonl")


def _process_state(host: HostInfo | None) -> ProcessState:
    if host is None or host.flight is None or host.flight.host != socket.gethostname():
        return ProcessState.UNKNOWN
    try:
        status = psutil.Process(host.flight.pid).status()
    except psutil.NoSuchProcess:
        return ProcessState.ENDED
    except psutil.AccessDenied:
        return ProcessState.UNKNOWN
    match status:
        case psutil.STATUS_STOPPED | psutil.STATUS_TRACING_STOP:
            return ProcessState.STOPPED
        case psutil.STATUS_ZOMBIE | psutil.STATUS_DEAD:
            return ProcessState.ENDED
    return ProcessState.RUNNING
