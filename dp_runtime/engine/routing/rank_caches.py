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
)
from dp_runtime.core.request import RankRequest
from dp_runtime.prefix_cache.page_hash import PageHasher


class RankCaches:
    """Follows ranks' KV events; pages of a prompt count from when it is given to its rank.

    Without the second, prompts that come together would each look new on every rank.
    """

    def __init__(self) -> None:
        self._stored: defaultdict[int, set[bytes]] = defaultdict(set)
        self._coming: defaultdict[int, Counter[bytes]] = defaultdict(Counter)

    def apply(self, dp_rank: int, events: Sequence[KvEvent]) -> None:
        stored = self._stored[dp_rank]
        for event in events:
            match event:
                case BlockStored():
                    stored.update(event.block_hashes)
                case BlockRemoved():
                    stored.difference_update(event.block_hashes)
                case AllBlocksCleared():
                    stored.clear()

    def forget(self, dp_ranks: Collection[int]) -> None:
        for dp_rank in dp_ranks:
            self._stored.pop(dp_rank, None)

    def expect(self, dp_rank: int, digests: Sequence[bytes]) -> None:
        """Count pages that a prompt brings, until `arrived` is told of it."""
        if digests:
            self._coming[dp_rank].update(digests)

    def arrived(self, dp_rank: int, digests: Sequence[bytes]) -> None:
        if digests:
            coming = self._coming[dp_rank]
            coming.subtract(digests)
            for digest in digests:
                if coming[digest] <= 0:
                    del coming[digest]

    def num_pages(self, dp_rank: int, digests: Sequence[bytes]) -> int:
        """Count the first pages of a prompt that a rank has, or is about to have."""
        if not digests:
            return 0
        stored, coming = self._stored[dp_rank], self._coming[dp_rank]
        known = (each in stored or each in coming for each in digests)
        return sum(takewhile(bool, known))


def prompt_pages(request: RankRequest, names: PageHasher) -> Sequence[bytes]:
    """Name the full pages of a prompt; none where all of it is computed in any case."""
    if request.computes_all:
        return ()
    tokens = np.array(request.prompt_token_ids, np.int64)
    salt, images = request.params.cache_salt, request.images
    return names.digests(tokens, request.embeds, salt, images=images)
