"""PageTable: which KV pages each request holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dp_runtime.core.attention_metadata import PageGeometry
from dp_runtime.core.batch import NULL_PAGE, Bool, Int32, Int64
from dp_runtime.core.request import RankRequest
from dp_runtime.scheduler.pages import PageAllocator


class PageTable:
    """The pages of each request by its row in the request table; a PerRequestState."""

    def __init__(self, geometry: PageGeometry, num_rows: int, max_tokens: int) -> None:
        self.page_size = geometry.page_size
        self.allocator = PageAllocator(geometry.num_pages)
        shape = num_rows, self.pages_for(max_tokens)
        self._pages: Int32 = np.full(shape, NULL_PAGE, np.int32)
        self._num_pages: Int64 = np.zeros(num_rows, np.int64)
        self._request_ids: Int64 = np.zeros(num_rows, np.int64)
        self._doubtful: Bool = np.zeros(num_rows, np.bool_)  # may hold NaN or infinite values
        self._to_clear: list[int] = []

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def add(self, req_index: int, request: RankRequest, outputs: Sequence[int]) -> None:
        """Begin without pages: what a preempted request had computed is gone."""
        assert not self._num_pages[req_index], f"row {req_index} holds pages already"
        self._request_ids[req_index] = request.request_id

    def remove(self, req_index: int) -> None:
        if self._doubtful[req_index]:
            self._to_clear += self.pages(req_index)
            self._doubtful[req_index] = False
        self.allocator.release(int(self._request_ids[req_index]), self.pages(req_index))
        self._pages[req_index] = NULL_PAGE
        self._num_pages[req_index] = 0

    def doubt(self, req_index: int) -> None:
        """Have the row's pages cleared before others use them: their values may not be finite."""
        self._doubtful[req_index] = True

    def trust(self, req_index: int) -> None:
        """Its newest logits were finite, and they depend on all that it wrote."""
        self._doubtful[req_index] = False

    def take_pages_to_clear(self) -> list[int]:
        """Pages that must be zeroed before the next step runs, and after those in flight."""
        pages, self._to_clear = self._to_clear, []
        return pages

    def check(self, req_indices: Sequence[int]) -> None:
        ids = self._request_ids.tolist()
        self.allocator.check({ids[index]: self.pages(index) for index in req_indices})

    def append(self, req_index: int, count: int) -> None:
        held = self._num_pages[req_index]
        pages = self.allocator.allocate(int(self._request_ids[req_index]), count)
        self._pages[req_index, held : held + count] = pages
        self._num_pages[req_index] = held + count

    def num_missing(self, req_index: int, num_tokens: int) -> int:
        return self.pages_for(num_tokens) - int(self._num_pages[req_index])

    def num_pages(self, req_index: int) -> int:
        return int(self._num_pages[req_index])

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
