"""PageTable: which KV pages each request holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain

import numpy as np

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.batch import NULL_PAGE, Bool, Int32, Int64
from dp_runtime.core.request import RankRequest
from dp_runtime.scheduler.pages import PageAllocator


class PageTable:
    """The pages of each request by its row in the request table; a PerRequestState."""

    def __init__(
        self,
        geometry: PageGeometry,
        num_rows: int,
        max_tokens: int,
        state_slots: range = range(0),  # for recurrent states behind cached pages
    ) -> None:
        self.page_size = geometry.page_size
        self.allocator = PageAllocator(geometry.num_pages, state_slots)
        shape = num_rows, self.pages_for(max_tokens)
        self._pages: Int32 = np.full(shape, NULL_PAGE, np.int32)
        self._num_pages: Int64 = np.zeros(num_rows, np.int64)
        self.num_cached: Int64 = np.zeros(num_rows, np.int64)  # its first pages, which it shares
        self.doubtful: Bool = np.zeros(num_rows, np.bool_)  # may hold NaN or infinite values
        self._to_clear: list[int] = []

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        """Begin without pages: those that a request had before, if any are left, are cached."""
        assert not self._num_pages[req_index], f"row {req_index} holds pages already"

    def remove(self, req_index: int) -> None:
        self.drop(req_index, 0)
        self.allocator.cache.pending.end(req_index)
        self.doubtful[req_index] = False

    def drop(self, req_index: int, first: int) -> None:
        pages = self.pages(req_index)
        if self.doubtful[req_index]:
            self._to_clear += pages[max(first, self.num_cached[req_index]) :]
        self.allocator.release(pages[first:])
        self._pages[req_index, first:] = NULL_PAGE
        self._num_pages[req_index] = first
        self.num_cached[req_index] = min(first, self.num_cached[req_index])

    def doubt(self, req_index: int) -> None:
        """Have the row's own pages cleared before others use them: they may not be finite."""
        self.doubtful[req_index] = True

    def trust(self, req_indices: Int64) -> None:
        """Their newest values were finite, and they depend on all that these wrote."""
        self.doubtful[req_indices] = False

    def take_pages_to_clear(self) -> list[int]:
        """Pages that must be zeroed before the next step runs, and after those in flight."""
        pages, self._to_clear = self._to_clear, []
        return pages

    def check(self, req_indices: Sequence[int]) -> None:
        self.allocator.check([self.pages(index) for index in req_indices])
        pending = self.allocator.cache.pending.owners
        assert {*pending} <= {*req_indices}, f"rows {pending} compute pages, and nobody has them"
        for index in req_indices:
            own = self.pages(index)[self.num_cached[index] :]
            assert not any(page in self.allocator.cache for page in own), f"row {index} shares more"

    def reach(self, req_index: int, num_tokens: int) -> None:
        self.append(req_index, self.num_missing(req_index, num_tokens))

    def append(self, req_index: int, count: int) -> None:
        self._append(req_index, self.allocator.allocate(count))

    def share(self, req_index: int, pages: Sequence[int]) -> None:
        """Begin a row with pages of the cache."""
        assert not self._num_pages[req_index], f"row {req_index} holds pages already"
        self.allocator.share(pages)
        self._append(req_index, pages)
        self.num_cached[req_index] = len(pages)

    def cache(self, req_index: int, digest: bytes, content: bytes) -> bool:
        """Share the row's first page that it has alone, which is full; False if it can't.

        Where the cache has the page already, that one takes the place of the row's own. Steps in
        flight read the old one, and run before any that could write it.
        """
        at = int(self.num_cached[req_index])
        own, cache = int(self._pages[req_index, at]), self.allocator.cache
        parent = int(self._pages[req_index, at - 1]) if at else NULL_PAGE
        page = cache.insert(own, digest, content, parent)
        if page is None:
            return False
        if page != own:
            self.allocator.share([page])
            self.allocator.release([own])
            self._pages[req_index, at] = page
        self.num_cached[req_index] = at + 1
        return True

    def _append(self, req_index: int, pages: Sequence[int]) -> None:
        held = self._num_pages[req_index]
        self._pages[req_index, held : held + len(pages)] = pages
        self._num_pages[req_index] = held + len(pages)

    def fits(self, num_tokens: int, found: Sequence[int]) -> bool:
        """Tell whether so many tokens, beginning with pages of the cache, find free pages."""
        needed = self.pages_for(num_tokens) - len(found) + self.allocator.num_evictable(found)
        return needed <= self.allocator.num_free

    def num_missing(self, req_index: int, num_tokens: int) -> int:
        return self.pages_for(num_tokens) - int(self._num_pages[req_index])

    def num_coming(self, req_indices: Iterable[int]) -> int:
        return self.allocator.num_held_only(Counter(chain(*map(self.pages, req_indices))))

    def page(self, req_index: int, number: int) -> int:
        return int(self._pages[req_index, number])

    def pages(self, req_index: int) -> list[int]:
        pages: list[int] = self._pages[req_index, : self._num_pages[req_index]].tolist()
        return pages

    def max_tokens(self, req_indices: Int64) -> Int64:
        return self._num_pages[req_indices] * self.page_size

    def rows(self, req_indices: Int64) -> Int32:
        """Return the pages [requests, pages], padded with the null page."""
        width = self._num_pages[req_indices].max(initial=0)
        pages: Int32 = self._pages[req_indices, :width]
        return pages
