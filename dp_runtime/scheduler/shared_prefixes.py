"""SharedPrefixes: what a request need not compute, and what it leaves for others."""

from __future__ import annotations

from dp_runtime.core.batch import NULL_PAGE, Int64
from dp_runtime.metrics.trace import PrefixCounts
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.scheduler.page_table import PageTable
from dp_runtime.scheduler.request_state import RequestState
from dp_runtime.scheduler.request_table import RequestTable


class SharedPrefixes:
    """Shares the full pages of requests that begin alike.

    A page is cached once committed steps have filled it and its request's logits were finite.
    """

    def __init__(self, hasher: PageHasher, table: RequestTable, pages: PageTable) -> None:
        self._hasher = hasher
        self._table = table
        self._pages = pages
        self.num_queries = 0  # tokens of requests when they first ran
        self.num_hits = 0  # and how many of these were cached

    @property
    def counts(self) -> PrefixCounts:
        allocator = self._pages.allocator
        return PrefixCounts(
            self.num_queries, self.num_hits, allocator.num_evictions, len(allocator.cache)
        )

    def find(self, request: RequestState) -> list[int]:
        """Return the cached pages that a request begins with; a token at least is left to compute.

        NOTE: a hit is as long as all that a layer keeps is there. Where layers have a recurrent
        state, it ends with the last page behind which a state is kept.
        """
        cache, pages, parent = self._pages.allocator.cache, list[int](), NULL_PAGE
        for number in range(request.num_reusable_tokens // self._hasher.page_size):
            content = self._content(request, number)
            page = cache.find(request.digests[number], content, parent)
            if page is None:
                break
            pages.append(page)
            parent = page
        return pages

    def begin(self, request: RequestState, pages: list[int]) -> None:
        num_tokens = len(pages) * self._hasher.page_size
        self._pages.share(request.req_index, pages)
        self._table.begin_at(request.req_index, num_tokens)
        if request.num_prompt_cached is None:
            request.num_prompt_cached = min(num_tokens, request.num_prompt_tokens)
            self.num_queries += request.num_tokens
            self.num_hits += num_tokens

    def committed(self, req_indices: Int64) -> None:
        size, pages = self._hasher.page_size, self._pages
        own = self._table.num_cached_tokens[req_indices] - pages.num_cached[req_indices] * size
        for req_index in req_indices[own >= size].tolist():
            if not pages.doubtful[req_index]:
                self._cache_pages(req_index)

    def _cache_pages(self, req_index: int) -> None:
        request = self._table.request(req_index)
        # A step may have run on behind the end of a request, with tokens that were dropped.
        known = self._hasher.num_pages(request.num_tokens)
        full = int(self._table.num_cached_tokens[req_index]) // self._hasher.page_size
        for number in range(int(self._pages.num_cached[req_index]), min(known, full)):
            content = self._content(request, number)
            if not self._pages.cache(req_index, request.digests[number], content):
                return

    def abandoned(self, req_index: int) -> None:
        """Go back to a page's first token, where a row would write a page that others may read."""
        first = int(self._table.num_cached_tokens[req_index]) // self._hasher.page_size
        if first < self._pages.num_cached[req_index]:
            self._pages.drop(req_index, first)
            self._table.begin_at(req_index, first * self._hasher.page_size)

    def _content(self, request: RequestState, number: int) -> bytes:
        content = self._hasher.content(request.tokens(*self._hasher.span(number)))
        if number == len(request.digests):
            own = request.request
            salt, digests = own.params.cache_salt, request.digests
            self._hasher.append(digests, content, own.embeds, salt, own.images)
        return content
