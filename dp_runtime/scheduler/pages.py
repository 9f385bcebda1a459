"""PageAllocator: which pages of the KV cache are free, and how many requests hold the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from dp_runtime.core.batch import NULL_PAGE
from dp_runtime.prefix_cache.prefix_cache import PrefixCache


class PageAllocator:
    """Gives out the pages of a pool; page 0 is the null page and belongs to nobody.

    Cached pages that nobody holds are given out after all others, held longest ago first, and of a
    sequence from its end: a page in the cache is never without its parent.
    """

    def __init__(self, num_pages: int, state_slots: range = range(0)) -> None:
        assert num_pages >= 2, f"{num_pages} pages: the null page and at least one more"
        self.num_pages = num_pages
        self.cache = PrefixCache(state_slots)
        self.num_evictions = 0
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._evictable: dict[int, None] = {}  # cached, held by nobody; held longest ago first
        self._num_holders: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free) + len(self._evictable)

    def num_evictable(self, pages: Iterable[int]) -> int:
        return sum(page in self._evictable for page in pages)

    def num_held_only(self, claims: Counter[int]) -> int:
        return sum(self._num_holders[page] == count for page, count in claims.items())

    def allocate(self, count: int) -> list[int]:
        assert 0 <= count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        self._num_holders.update(dict.fromkeys(pages, 1))
        return pages

    def share(self, pages: Iterable[int]) -> None:
        for page in pages:
            assert page in self.cache, f"page {page} is not in the cache"
            self._evictable.pop(page, None)
            self._num_holders[page] = self._num_holders.get(page, 0) + 1

    def release(self, pages: Sequence[int]) -> None:
        for page in reversed(pages):
            holders = self._num_holders.get(page, 0) - 1
            assert holders >= 0, f"page {page} is released, and nobody holds it"
            if holders:
                self._num_holders[page] = holders
                continue
            del self._num_holders[page]
            if page in self.cache:
                self._evictable[page] = None
            else:
                self._free.append(page)

    def _evict(self) -> None:
        page = next(iter(self._evictable))
        del self._evictable[page]
        self.cache.remove(page)
        self._free.append(page)
        self.num_evictions += 1

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that every page is free, cached, or held by as many requests as hold it."""
        claims = [Counter(pages) for pages in held]
        twice = {page for each in claims for page, times in each.items() if times > 1}
        assert not twice, f"a request holds pages {sorted(twice)} twice"
        holders = sum(claims, Counter())
        assert holders == self._num_holders, f"pages are held {holders}, not {self._num_holders}"
        shared = {page for page, times in holders.items() if times > 1 and page not in self.cache}
        assert not shared, f"pages {sorted(shared)} are shared and not in the cache"
        every = Counter((*holders, *self._free, *self._evictable))
        assert NULL_PAGE not in every, "the null page is free or held"
        twice = {page for page, times in every.items() if times > 1}
        assert not twice, f"pages {sorted(twice)} are free and held, or free twice"
        lost = set(range(1, self.num_pages)) - set(every)
        assert not lost, f"pages {sorted(lost)} are lost"
        assert all(page in self.cache for page in self._evictable), "a free page is not cached"
        assert not any(page in self.cache for page in self._free), "a cached page is given out"
        self.cache.check()
