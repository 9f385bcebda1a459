"""RequestTable: what every step reads and changes of a rank's requests, as arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dp_runtime.core.batch import NULL_PAGE, Int32, Int64
from dp_runtime.scheduler.request_state import NO_ROW, RequestState


class RequestTable:
    """One row for each request that holds pages, so that a step of decodes is array operations.

    `num_known` and `num_computed` are *projected*: they include steps that were launched and not
    yet committed, verifications among them as if all drafts were accepted: they are upper bounds.
    A row is taken at admission, and freed when its request has stopped running and no launched
    step touches it.
    """

    def __init__(self, num_rows: int, max_pages: int) -> None:
        def column() -> Int64:
            return np.zeros(num_rows, np.int64)

        self.num_rows = num_rows
        self.request_ids = column()
        self.num_prompt = column()
        self.max_tokens = column()  # prompt and outputs
        self.num_known = column()  # prompt and outputs, those that launched steps sample included
        self.num_computed = column()  # tokens in the cache once all launched steps are done
        self.num_launched = column()  # launched steps with rows of the request
        self.last_token = column()  # of those the host knows
        self.source_row = column()  # the sampled token's index in the last launched step, or -1
        self.num_pages = column()
        self.page_table: Int32 = np.full((num_rows, max_pages), NULL_PAGE, np.int32)
        self._requests: list[RequestState | None] = [None] * num_rows
        self._free = list(reversed(range(num_rows)))

    def take(self, live: RequestState) -> int:
        """A row for a request that has nothing in the cache yet."""
        assert live.row == NO_ROW, f"request {live.request_id} has row {live.row} already"
        assert self._free, f"{len(self._requests)} rows, and none is free"
        row = live.row = self._free.pop()
        self._requests[row] = live
        self.request_ids[row] = live.request_id
        self.num_prompt[row] = live.num_prompt
        self.max_tokens[row] = live.num_prompt + live.max_outputs
        self.num_known[row] = live.num_tokens
        self.num_computed[row] = self.num_launched[row] = self.num_pages[row] = 0
        self.last_token[row] = live.tokens(live.num_tokens - 1, live.num_tokens)[0]
        self.source_row[row] = -1
        return row

    def free(self, live: RequestState) -> None:
        """Give a request's row back."""
        self._requests[live.row] = None
        self.page_table[live.row] = NULL_PAGE
        self._free.append(live.row)
        live.row = NO_ROW

    def request(self, row: int) -> RequestState:
        """Whose row it is."""
        live = self._requests[row]
        assert live is not None, f"row {row} belongs to nobody"
        return live

    def add_pages(self, row: int, pages: list[int]) -> None:
        """Append pages to a row's page table."""
        held = self.num_pages[row]
        self.page_table[row, held : held + len(pages)] = pages
        self.num_pages[row] = held + len(pages)

    def pages(self, row: int) -> list[int]:
        """The pages of a row."""
        pages: list[int] = self.page_table[row, : self.num_pages[row]].tolist()
        return pages

    def num_needed(self, rows: Int64) -> Int64:
        """Tokens to feed before the next one can be sampled; 0 if no more will be."""
        known = self.num_known[rows]
        return (known - self.num_computed[rows]) * (known < self.max_tokens[rows])

    def prefilling(self, rows: Int64, needed: Int64) -> NDArray[np.bool_]:
        """Which rows have more to feed than the token that was sampled last."""
        return (needed > 1) | (self.num_computed[rows] < self.num_prompt[rows])

    def future_token_index(self, rows: Int64) -> Int64:
        """Where the rows' last tokens lie in what the last step sampled; -1: in `last_token`."""
        return np.where(self.num_launched[rows] > 0, self.source_row[rows], -1)

    def launch(self, rows: Int64, seq_lens: Int32, sampled: Int64, num_tokens: Int64 | int) -> None:
        """Project a step that leaves seq_lens tokens in the cache and samples for some rows.

        num_tokens: that each of these gets at most.
        """
        self.num_launched[rows] += 1
        self.num_computed[rows] = seq_lens
        self.num_known[sampled] += num_tokens
        self.source_row[sampled] = np.arange(len(sampled))
