"""GraphBuckets: sizes at which graphs are captured, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

LOCAL_STEP = 16  # requests; above it, local rows are captured in multiples of it
MIN_GATHERED = 16
GATHERED_FACTOR = 4  # between gathered sizes: few are needed, since kernels read the real counts
# Above it, the GPU is slower than the host's kernel launches: capturing stages gains nothing.
MAX_PIECEWISE_ROWS = 2048


def _gathered(rows: int, max_rows: int) -> int:
    bucket = MIN_GATHERED
    while bucket < rows:
        bucket *= GATHERED_FACTOR
    return min(bucket, max_rows)


@dataclass(frozen=True)
class GraphKey:
    local_rows: int
    gathered_rows: int  # of every rank


@dataclass(frozen=True)
class GraphBuckets:
    """Sizes of one kind of pass's graphs, for up to max_requests of query_len rows each."""

    max_requests: int
    query_len: int = 1

    @property
    def max_rows(self) -> int:
        return self.max_requests * self.query_len

    def gathered(self, largest: int) -> int:  # rows of every rank, from the largest rank's
        assert 0 < largest <= self.max_rows, f"{largest} rows, graphs go to {self.max_rows}"
        return _gathered(self.local(largest), self.max_rows)

    def local(self, rows: int) -> int:
        assert 0 <= rows <= self.max_rows, f"{rows} rows, graphs go to {self.max_rows}"
        return self._requests(-(-rows // self.query_len)) * self.query_len

    def _requests(self, count: int) -> int:
        if count <= 2:
            return count
        if count <= LOCAL_STEP:
            return min(1 << (count - 1).bit_length(), self.max_requests)
        return min(-(-count // LOCAL_STEP) * LOCAL_STEP, self.max_requests)

    def graph_keys(self) -> tuple[GraphKey, ...]:
        """Return every key a step may need, the largest first: the others fit into its memory."""
        locals_ = {self.local(count * self.query_len) for count in range(self.max_requests + 1)}
        sizes = {self.gathered(rows) for rows in locals_ if rows}
        keys = {GraphKey(rows, size) for size in sizes for rows in locals_ if rows <= size}
        return tuple(sorted(keys, key=lambda key: (-key.gathered_rows, -key.local_rows)))


@dataclass(frozen=True)
class PiecewiseBuckets:
    """Gathered sizes for which MoE stages are captured alone; none if max_rows is 0."""

    max_rows: int = 0  # of a rank

    @classmethod
    def for_steps(cls, max_num_tokens: int) -> PiecewiseBuckets:
        return cls(min(max_num_tokens, MAX_PIECEWISE_ROWS))

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(  # the largest first: the others fit into its memory
            sorted({_gathered(n, self.max_rows) for n in range(1, self.max_rows + 1)}, reverse=True)
        )

    def cover(self, largest: int) -> bool:
        return 0 < largest <= self.max_rows

    def gathered(self, largest: int) -> int:  # rows of every rank, from the largest rank's
        assert self.cover(largest), f"{largest} rows, stages go to {self.max_rows}"
        return _gathered(largest, self.max_rows)
