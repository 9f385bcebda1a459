"""KV events: what enters and leaves a rank's prefix cache, by the names that vLLM gives them."""

from __future__ import annotations

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
        self._stored: dict[bytes, BlockStored] = {}  # by the hash of its one page, in order
        self._removed: dict[bytes, None] = {}

    def __bool__(self) -> bool:
        return bool(self._stored or self._removed)

    def add(self, events: Iterable[KvEvent]) -> None:
        """Take in events of one page each, which come in the order of the changes."""
        for event in events:
            match event:
                case BlockStored(block_hashes=(page,)):
                    self._store(page, event)
                case BlockRemoved(block_hashes=(page,)):
                    self._remove(page)
                case _:
                    raise AssertionError(f"no event of one page: {event}")

    def take(self) -> tuple[KvEvent, ...]:
        """Return what has changed since the last call; removals come first."""
        removed = (BlockRemoved(tuple(self._removed)),) if self._removed else ()
        stored = tuple(self._stored.values())
        self._stored, self._removed = {}, {}
        return (*removed, *stored)

    def _store(self, page: bytes, event: BlockStored) -> None:
        if page in self._removed:
            del self._removed[page]
        else:
            self._stored[page] = event

    def _remove(self, page: bytes) -> None:
        if page in self._stored:
            del self._stored[page]
        else:
            self._removed[page] = None
