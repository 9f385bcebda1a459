"""Region: memory that the ranks of one host map, with aborts, step records and areas for rows.

Layout, in bytes: abort marks [dp_size] int64, abort texts [dp_size][512], records
[dp_size][2][RECORD_WORDS + 2] int64 (turn, words, checksum), areas [2][dp_size][area_bytes].
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dp_runtime.parallel.agreement import RECORD_WORDS, StepRecord

_TEXT_BYTES = 512
_BODY = struct.Struct(f"={RECORD_WORDS + 1}q")  # turn, words
_RECORD = struct.Struct(f"={RECORD_WORDS + 2}q")  # turn, words, checksum
_CHECKSUM = struct.Struct("=q")
_MARKED = 1 << 32  # keeps a mark different from 0 for every checksum
_ALIGNMENT = 64


@dataclass(frozen=True)
class RegionLayout:
    dp_size: int
    area_bytes: int

    @cached_property
    def texts(self) -> int:
        return 8 * self.dp_size

    @cached_property
    def records(self) -> int:
        return self.texts + _TEXT_BYTES * self.dp_size

    @cached_property
    def areas(self) -> int:
        end = self.records + 2 * self.dp_size * self.record_bytes
        return -(-end // _ALIGNMENT) * _ALIGNMENT

    @property
    def record_bytes(self) -> int:
        return _RECORD.size

    @property
    def total_bytes(self) -> int:
        return self.areas + 2 * self.dp_size * self.area_bytes

    def record(self, dp_rank: int, turn: int) -> int:
        return self.records + (2 * dp_rank + turn % 2) * self.record_bytes


class Region:
    def __init__(self, memory: mmap.mmap, layout: RegionLayout, dp_rank: int) -> None:
        self._memory, self._layout, self._rank = memory, layout, dp_rank
        self._marks = memoryview(memory)[: layout.texts].cast("q")
        self._areas: dict[torch.dtype, tuple[tuple[Tensor, ...], ...]] = {}

    @classmethod
    def create(cls, path: str, layout: RegionLayout) -> None:
        """Write a zeroed region, which appears under its name when it is complete."""
        unfinished = f"{path}.new"
        fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(fd, "wb") as file:
            # Written, not just sized: a full file system is an error now and no SIGBUS later.
            left = layout.total_bytes
            while left:
                left -= file.write(bytes(min(left, 1 << 20)))
        os.rename(unfinished, path)

    @classmethod
    def attach(cls, path: str, layout: RegionLayout, dp_rank: int) -> Region:
        fd = os.open(path, os.O_RDWR)
        try:
            size = os.fstat(fd).st_size
            assert size == layout.total_bytes, (
                f"{path} has {size} bytes, rank {dp_rank} expects {layout.total_bytes}: "
                "the ranks were given different sizes"
            )
            return cls(mmap.mmap(fd, size), layout, dp_rank)
        finally:
            os.close(fd)

    def areas(self, dtype: torch.dtype, turn: int) -> tuple[Tensor, ...]:
        if dtype not in self._areas:
            layout = self._layout
            flat = torch.frombuffer(self._memory, dtype=torch.uint8, offset=layout.areas)
            halves = flat.view(dtype).view(2, layout.dp_size, -1).unbind()
            self._areas[dtype] = tuple(half.unbind() for half in halves)
        return self._areas[dtype][turn % 2]

    def write_record(self, turn: int, record: StepRecord) -> None:
        body = _BODY.pack(turn, *record.to_words())
        start = self._layout.record(self._rank, turn)
        self._memory[start : start + _RECORD.size] = body + _CHECKSUM.pack(zlib.crc32(body))

    def read_record(self, dp_rank: int, turn: int) -> StepRecord | None:
        """Return the record of a rank and turn; None while it is not, or only partly, there."""
        start = self._layout.record(dp_rank, turn)
        posted = self._memory[start : start + _RECORD.size]
        words = _RECORD.unpack(posted)
        if words[0] != turn or words[-1] != zlib.crc32(posted[: _BODY.size]):
            return None
        return StepRecord.from_words(words[1:-1])

    def newest_record(self, dp_rank: int) -> StepRecord | None:
        starts = (self._layout.record(dp_rank, half) for half in (0, 1))
        turns = sorted(_CHECKSUM.unpack_from(self._memory, start)[0] for start in starts)
        records = (self.read_record(dp_rank, turn) for turn in reversed(turns) if turn > 0)
        return next((record for record in records if record is not None), None)

    def post_abort(self, reason: str) -> None:
        """Have all ranks read why; `reason` names the rank."""
        text = reason.encode()[:_TEXT_BYTES].ljust(_TEXT_BYTES, b"\0")
        start = self._layout.texts + _TEXT_BYTES * self._rank
        self._memory[start : start + _TEXT_BYTES] = text
        self._marks[self._rank] = _MARKED | zlib.crc32(text)

    def abort_reason(self) -> str | None:
        """Return why a rank aborted, or None; a text counts once it has fully arrived."""
        if not any(self._marks):
            return None
        for dp_rank, mark in enumerate(self._marks):
            start = self._layout.texts + _TEXT_BYTES * dp_rank
            text = self._memory[start : start + _TEXT_BYTES]
            if mark == _MARKED | zlib.crc32(text):
                return text.rstrip(b"\0").decode(errors="replace")
        return None

    def close(self) -> None:
        """Unmap; no other thread may be using the region."""
        self._areas.clear()
        self._marks.release()
        self._memory.close()
