"""PageAllocator: which pages of the KV cache are free, and who owns the others."""

from __future__ import annotations

from collections import Counter

from dp_runtime.core.batch import NULL_PAGE


class PageAllocator:
    """Gives out the pages of a pool; page 0 is the null page and belongs to nobody."""

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 2, f"{num_pages} pages: the null page and at least one more"
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))
        self._owner: dict[int, int] = {}  # page -> request id

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, request_id: int, count: int) -> list[int]:
        assert 0 <= count <= self.num_free, f"{count} pages asked for, {self.num_free} free"
        pages = [self._free.pop() for _ in range(count)]
        self._owner.update(dict.fromkeys(pages, request_id))
        return pages

    def release(self, request_id: int, pages: list[int]) -> None:
        for page in pages:
            owner = self._owner.pop(page, None)
            assert owner == request_id, f"page {page} is owned by {owner}, not {request_id}"
            self._free.append(page)

    def check(self, owned: dict[int, list[int]]) -> None:
        """Assert that every page is free or owned as `owned` (request id -> pages) says."""
        claimed = Counter(page for pages in owned.values() for page in pages)
        claimed.update(self._free)
        assert NULL_PAGE not in claimed, "the null page is free or owned"
        twice = [page for page, times in claimed.items() if times > 1]
        assert not twice, f"pages {twice} are held twice"
        lost = set(range(1, self.num_pages)) - set(claimed)
        assert not lost, f"pages {sorted(lost)} are lost"
        for request_id, pages in owned.items():
            wrong = [page for page in pages if self._owner.get(page) != request_id]
            assert not wrong, f"pages {wrong} are not owned by request {request_id}"
