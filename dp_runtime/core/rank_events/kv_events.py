"""KV events: what enters and leaves a rank's prefix cache, by the names that vLLM gives them."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar


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


@dataclass(frozen=True)
class StateStored:
    """Recurrent states, each behind a stored page; told to the own router alone."""

    block_hashes: tuple[bytes, ...]


@dataclass(frozen=True)
class StateRemoved:
    block_hashes: tuple[bytes, ...]


KvEvent = BlockStored | BlockRemoved | AllBlocksCleared | StateStored | StateRemoved

Stored = TypeVar("Stored", BlockStored, StateStored)


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
        self._pages, self._states = _Changes[BlockStored](), _Changes[StateStored]()
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._cleared or self._pages or self._states)

    def add(self, events: Iterable[KvEvent]) -> None:
        """Take in events in the order of the changes; what is stored comes one by one."""
        with self._lock:
            for event in events:
                match event:
                    case BlockStored():
                        self._pages.store(event)
                    case BlockRemoved():
                        self._pages.remove(event.block_hashes, self._cleared)
                    case StateStored():
                        self._states.store(event)
                    case StateRemoved():
                        self._states.remove(event.block_hashes, self._cleared)
                    case AllBlocksCleared():
                        self._forget(cleared=True)

    def take(self) -> tuple[KvEvent, ...]:
        """Return what has changed since the last call, in an order in which it can be applied."""
        with self._lock:
            cleared: tuple[KvEvent, ...] = (AllBlocksCleared(),) if self._cleared else ()
            pages, states = self._pages, self._states
            self._forget(cleared=False)
        gone = (StateRemoved(tuple(states.removed)),) if states.removed else ()
        removed = (BlockRemoved(tuple(pages.removed)),) if pages.removed else ()
        return (*cleared, *gone, *removed, *pages.stored.values(), *states.stored.values())

    def _forget(self, cleared: bool) -> None:
        self._cleared, self._pages, self._states = cleared, _Changes(), _Changes()


class _Changes(Generic[Stored]):
    """What was removed of what a follower knows, and what it does not know yet, in order."""

    def __init__(self) -> None:
        self.removed: dict[bytes, None] = {}
        self.stored: dict[bytes, Stored] = {}

    def __bool__(self) -> bool:
        return bool(self.removed or self.stored)

    def store(self, event: Stored) -> None:
        (name,) = event.block_hashes
        if name in self.removed:
            del self.removed[name]
        else:
            self.stored[name] = event

    def remove(self, names: Sequence[bytes], cleared: bool) -> None:
        for name in names:
            if name in self.stored:
                del self.stored[name]
            elif not cleared:
                self.removed[name] = None
