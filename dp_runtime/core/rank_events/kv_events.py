"""KV events: what enters and leaves a rank's prefix cache, by the names that vLLM gives them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class BlockStored:
    """Pages that follow one another, each found by its hash from now on."""

    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None  # of the page before them; None: they begin a sequence
    token_ids: tuple[int, ...]  # [block_size * pages]
    block_size: int


@dataclass(frozen=True)
class BlockRemoved:
    block_hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class AllBlocksCleared:
    pass


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared


@dataclass(frozen=True)
class KvEventBatch:
    ts: float  # time.time()
    events: tuple[KvEvent, ...]
    data_parallel_rank: int


class PendingKvEvents:
    """Changes of a cache that nobody has taken yet, without what came and went meanwhile.

    It never holds more pages than the cache had when they were last taken, and has now.
    """

    def __init__(self) -> None:
        self._cleared = False
        self._removed: dict[bytes, None] = {}
        self._stored: dict[bytes, BlockStored] = {}  # a page each, in order
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._cleared or self._removed or self._stored)

    def add(self, events: Iterable[KvEvent]) -> None:
        """Take in events in the order of the changes; what is stored comes page by page."""
        with self._lock:
            for event in events:
                match event:
                    case BlockStored():
                        self._store(event)
                    case BlockRemoved():
                        for page in event.block_hashes:
                            self._remove(page)
                    case AllBlocksCleared():
                        self._cleared, self._removed, self._stored = True, {}, {}

    def take(self) -> tuple[KvEvent, ...]:
        """Return what has changed since the last call, in an order in which it can be applied."""
        with self._lock:
            cleared: tuple[KvEvent, ...] = (AllBlocksCleared(),) if self._cleared else ()
            removed = (BlockRemoved(tuple(self._removed)),) if self._removed else ()
            stored = tuple(self._stored.values())
            self._cleared, self._removed, self._stored = False, {}, {}
        return (*cleared, *removed, *stored)

    def _store(self, event: BlockStored) -> None:
        (page,) = event.block_hashes
        if page in self._removed:
            del self._removed[page]
        else:
            self._stored[page] = event

    def _remove(self, page: bytes) -> None:
        if page in self._stored:
            del self._stored[page]
        elif not self._cleared:
            self._removed[page] = None
