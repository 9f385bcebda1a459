"""PrefixCache: which pages hold which beginnings of sequences."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dp_runtime.core.batch import NULL_PAGE
from dp_runtime.prefix_cache.page_events import PageEvents
from dp_runtime.prefix_cache.pending_pages import PendingPages
from dp_runtime.prefix_cache.state_checkpoints import StateCheckpoints


@dataclass(frozen=True, eq=False, slots=True)
class CachedPage:
    page: int
    parent: int  # the page before it; the null page: it is a first one
    digest: bytes
    content: bytes  # its tokens


class PrefixCache:
    """Pages by their digests; the parent of a page that is here is here too.

    A page is found where the tokens, too, of all pages up to it are the same.
    """

    def __init__(self, state_slots: range = range(0)) -> None:
        self.events: PageEvents | None = None  # for who follows the cache
        self.states = StateCheckpoints(state_slots)
        self.pending = PendingPages()
        self._by_digest: dict[bytes, CachedPage] = {}
        self._by_page: dict[int, CachedPage] = {}
        self._num_children: dict[int, int] = {}  # by page, of those that have any

    def follow(self, events: PageEvents) -> None:
        """Tell these of all changes from now on."""
        self.events = events
        self.states.on_change = lambda page, is_there: events.state_changed(
            self._by_page[page].digest, is_there
        )

    def __len__(self) -> int:
        return len(self._by_page)

    def __contains__(self, page: int) -> bool:
        return page in self._by_page

    def entry(self, page: int) -> CachedPage:
        return self._by_page[page]

    def holds(self, entry: CachedPage) -> bool:
        """Tell whether this page, and with it all those before it, never left the cache."""
        return self._by_page.get(entry.page) is entry

    def find(self, digest: bytes, content: bytes, parent: int) -> int | None:
        found = self._by_digest.get(digest)
        if found is None or found.content != content or found.parent != parent:
            return None
        return found.page

    def insert(self, page: int, digest: bytes, content: bytes, parent: int) -> int | None:
        """Return the page that has this content now; None if another one has the digest."""
        if digest in self._by_digest:
            return self.find(digest, content, parent)
        assert page not in self._by_page, f"page {page} holds another content"
        cached = CachedPage(page, parent, digest, content)
        self._by_digest[digest] = self._by_page[page] = cached
        if self.events is not None:
            before = None if parent == NULL_PAGE else self._by_page[parent].digest
            self.events.stored(digest, before, content)
        self._num_children[parent] = self._num_children.get(parent, 0) + 1
        return page

    def has_children(self, page: int) -> bool:
        return page in self._num_children

    def remove(self, page: int) -> None:
        """Forget a page, and with it the state behind it."""
        self.states.drop(page)
        cached = self._by_page.pop(page)
        del self._by_digest[cached.digest]
        if self.events is not None:
            self.events.removed(cached.digest)
        self._num_children[cached.parent] -= 1
        if not self._num_children[cached.parent]:
            del self._num_children[cached.parent]

    def check(self) -> None:
        for cached in self._by_page.values():
            assert self._by_digest[cached.digest] is cached, f"page {cached.page} is not found"
            ok = cached.parent == NULL_PAGE or cached.parent in self._by_page
            assert ok, f"page {cached.page} outlives its parent {cached.parent}"
        children = Counter(cached.parent for cached in self._by_page.values())
        assert children == self._num_children, f"{self._num_children} children, not {children}"
        others = [page for page in self.states.pages if page not in self._by_page]
        assert not others, f"states behind pages {others}, which are not cached"
