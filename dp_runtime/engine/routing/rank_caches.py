"""RankCaches: which pages of prompts each rank has cached, or is about to have."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from itertools import takewhile

import numpy as np

from dp_runtime.core.rank_events.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KvEvent,
    StateRemoved,
    StateStored,
)
from dp_runtime.core.request import RankRequest
from dp_runtime.prefix_cache.page_hash import PageHasher


class KnownDigests:
    """Digests of what a rank has, and of what prompts bring that were given to it."""

    def __init__(self) -> None:
        self.stored = set[bytes]()
        self._coming = Counter[bytes]()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self.stored or digest in self._coming

    def expect(self, digests: Sequence[bytes]) -> None:
        self._coming.update(digests)

    def arrived(self, digests: Sequence[bytes]) -> None:
        self._coming.subtract(digests)
        for digest in digests:
            if self._coming[digest] <= 0:
                del self._coming[digest]


class RankCaches:
    """Follows ranks' KV events; pages of a prompt count from when it is given to its rank.

    Without the second, prompts that come together would each look new on every rank. With recurrent
    layers a prompt goes on from the last page that has a state behind it; prompts leave one behind
    the last of their pages, unless none is copied.
    """

    def __init__(self, needs_states: bool = False, copies_states: bool = True) -> None:
        self._needs_states, self._copies_states = needs_states, copies_states
        self.pages: defaultdict[int, KnownDigests] = defaultdict(KnownDigests)  # by dp_rank
        self.states: defaultdict[int, KnownDigests] = defaultdict(
            KnownDigests
        )  # by the pages they are behind

    def apply(self, dp_rank: int, events: Sequence[KvEvent]) -> None:
        pages, states = self.pages[dp_rank].stored, self.states[dp_rank].stored
        for event in events:
            match event:
                case BlockStored():
                    pages.update(event.block_hashes)
                case BlockRemoved():
                    pages.difference_update(event.block_hashes)
                case StateStored():
                    states.update(event.block_hashes)
                case StateRemoved():
                    states.difference_update(event.block_hashes)
                case AllBlocksCleared():
                    self.forget([dp_rank])

    def forget(self, dp_ranks: Collection[int]) -> None:
        for dp_rank in dp_ranks:
            self.pages[dp_rank].stored.clear()
            self.states[dp_rank].stored.clear()

    def expect(self, dp_rank: int, digests: Sequence[bytes]) -> None:
        """Count what a prompt brings, until `arrived` is told of it."""
        if digests:
            self.pages[dp_rank].expect(digests)
            self.states[dp_rank].expect(digests[-1:] if self._copies_states else ())

    def arrived(self, dp_rank: int, digests: Sequence[bytes]) -> None:
        if digests:
            self.pages[dp_rank].arrived(digests)
            self.states[dp_rank].arrived(digests[-1:] if self._copies_states else ())

    def num_pages(self, dp_rank: int, digests: Sequence[bytes]) -> int:
        """Count the first pages of a prompt that it need not compute on a rank, by what is known.

        A state may be left some pages earlier than is expected here: see `StateTracks`.
        """
        pages, states = self.pages[dp_rank], self.states[dp_rank]
        known = [*takewhile(pages.__contains__, digests)]
        while self._needs_states and known and known[-1] not in states:
            known.pop()
        return len(known)


def prompt_pages(request: RankRequest, names: PageHasher) -> Sequence[bytes]:
    """Name the pages that a prompt can begin with; none where it is computed in any case.

    Its last token is always computed, and so is the page of that.
    """
    if request.computes_all:
        return ()
    tokens = np.array(request.prompt_token_ids, np.int64)
    salt, images = request.params.cache_salt, request.images
    digests = names.digests(tokens, request.embeds, salt, images=images)
    return digests[: (len(tokens) - 1) // names.page_size]
