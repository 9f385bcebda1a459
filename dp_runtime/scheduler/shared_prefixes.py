"""SharedPrefixes: what a request need not compute, and what it leaves for others."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.core.batch import NULL_PAGE, Int64
from dp_runtime.metrics.trace import PrefixCounts
from dp_runtime.prefix_cache.page_hash import PageHasher
from dp_runtime.scheduler.limits import Limits
from dp_runtime.scheduler.page_table import PageTable
from dp_runtime.scheduler.request_state import RequestState
from dp_runtime.scheduler.request_table import RequestTable
from dp_runtime.scheduler.state_tracks import StateTracks


@dataclass(frozen=True, eq=False)
class FoundPrefix:
    """Cached pages; where layers have a recurrent state the last of them has one behind it."""

    pages: list[int]
    branch: int = 0  # tokens up to where cached pages part with no state there; 0: nowhere


class SharedPrefixes:
    """Shares the full pages of requests that begin alike.

    A page is cached once committed steps have filled it, and what its request's last row gave was
    finite, be it logits or, of a chunk that samples nothing, the last layer's values.
    Who brings experts for its tokens shares nothing: a page's name does not tell of experts.
    """

    def __init__(
        self,
        hasher: PageHasher,
        table: RequestTable,
        pages: PageTable,
        states: StateTracks,
        limits: Limits,
    ) -> None:
        self.states = states
        self._min_awaited = -(-limits.min_awaited_tokens // hasher.page_size)  # pages
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

    def find(self, request: RequestState, num_again: int = 1) -> FoundPrefix:
        """Find the cached pages that a request begins with; num_again tokens at least are left."""
        cache, found = self._pages.allocator.cache, request.found
        digests = self._digests(request)
        reusable = min(request.num_reusable_tokens, request.num_tokens - num_again)
        while found and not cache.holds(found[-1]):
            found.pop()
        for number in range(len(found), max(0, reusable) // self._hasher.page_size):
            parent = found[-1].page if found else NULL_PAGE
            page = cache.find(digests[number], request.contents[number], parent)
            if page is None:
                break
            found.append(cache.entry(page))
        pages = [each.page for each in found]
        if not self.states.are_kept:
            return FoundPrefix(pages)
        with_state = [count for count, page in enumerate(pages, 1) if page in cache.states]
        usable = with_state[-1] if with_state else 0
        parts = usable < len(pages) and cache.has_children(pages[-1])
        return FoundPrefix(pages[:usable], len(pages) * self._hasher.page_size if parts else 0)

    def awaits(self, request: RequestState, found: FoundPrefix) -> bool:
        """Tell whether others are computing so many of a request's pages that waiting pays."""
        pending, first = self._pages.allocator.cache.pending, len(found.pages)
        if not pending:
            return False
        names = self._digests(request)[: request.num_reusable_tokens // self._hasher.page_size]
        if self.states.are_kept:
            return any(each in pending for each in names[first + self._min_awaited - 1 :])
        # Those that are there already count too: who has begun to wait has the last ones as well.
        around = names[max(0, first + 1 - self._min_awaited) : first + self._min_awaited]
        lacks = first < len(names) and names[first] in pending
        return lacks and sum(each in pending for each in around) >= self._min_awaited

    def begin(self, request: RequestState, found: FoundPrefix) -> None:
        num_tokens = len(found.pages) * self._hasher.page_size
        self._pages.share(request.req_index, found.pages)
        self.states.begin(request.req_index, found.pages, found.branch)
        self._table.begin_at(request.req_index, num_tokens)
        request.found.clear()
        if request.request.replay is None:
            coming = self._digests(request)[len(found.pages) :]
            if self.states.are_kept:  # pages alone are no hit
                end = self.states.num_promised(request.num_tokens, found.branch)
                coming = self._digests(request)[len(found.pages) : end][-1:]
            self._pages.allocator.cache.pending.begin(request.req_index, coming)
        if request.num_prompt_cached is None:
            request.num_prompt_cached = min(num_tokens, request.num_prompt_tokens)
            self.num_queries += request.num_tokens
            self.num_hits += num_tokens

    def committed(self, req_indices: Int64, sampled: Int64) -> None:
        """Cache what steps of these rows have filled; prompts of those that sampled are done."""
        size, pages = self._hasher.page_size, self._pages
        own = self._table.num_cached_tokens[req_indices] - pages.num_cached[req_indices] * size
        for req_index in req_indices[own >= size].tolist():
            if not (req_index in self._table.replays_routing or pages.doubtful[req_index]):
                self._cache_pages(req_index)
        if self.states.are_kept:
            self.states.attach(req_indices)
        pending = pages.allocator.cache.pending
        for req_index in pending.owners.intersection(sampled.tolist()) if pending else ():
            pending.end(req_index)

    def _cache_pages(self, req_index: int) -> None:
        request = self._table.request(req_index)
        # A step may have run on behind the end of a request, with tokens that were dropped.
        digests, contents = self._digests(request), request.contents
        full = int(self._table.num_cached_tokens[req_index]) // self._hasher.page_size
        for number in range(int(self._pages.num_cached[req_index]), min(len(digests), full)):
            if not self._pages.cache(req_index, digests[number], contents[number]):
                return

    def abandoned(self, req_index: int) -> None:
        """Go back to a page's first token, where a row would write a page that others may read."""
        first = int(self._table.num_cached_tokens[req_index]) // self._hasher.page_size
        if first < self._pages.num_cached[req_index]:
            self._pages.drop(req_index, first)
            self._table.begin_at(req_index, first * self._hasher.page_size)

    def begin_again(self, request: RequestState, num_again: int) -> None:
        """Begin a request whose recurrent state is lost with what is cached, as if it were new."""
        if self.states.are_kept and not self._table.num_cached_tokens[request.req_index]:
            self._pages.drop(request.req_index, 0)
            self._pages.allocator.cache.pending.end(request.req_index)
            self.begin(request, self.find(request, num_again))

    def _digests(self, request: RequestState) -> list[bytes]:
        """Name all full pages of a request; it keeps what they hold, too."""
        own, digests = request.request, request.digests
        first = len(digests)
        if first < self._hasher.num_pages(request.num_tokens):
            tokens = request.tokens(first * self._hasher.page_size, request.num_tokens)
            for content in self._hasher.contents(tokens):
                request.contents.append(content)
                self._hasher.append(digests, content, own.embeds, own.params.cache_salt, own.images)
        return digests
