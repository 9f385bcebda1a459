"""GraphBuckets: sizes at which graphs are captured, the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

SMALLEST = 16  # gathered rows of a rank
FACTOR = 4  # between gathered sizes: few are needed, since kernels read the real counts
LOCAL_STEP = 16  # requests; above it, local rows are captured in multiples of it
MIN_PIECES = 64  # rows
FINE_PIECES = 256  # rows, from which on a null row costs more than a graph
# Pieces of more rows would keep more memory, and the GPU takes longer for them than to launch them.
MAX_PIECEWISE_ROWS = 4096


def gathered_size(largest: int, max_rows: int) -> int:  # of every rank, from the largest's rows
    size = SMALLEST
    while size < largest:
        size *= FACTOR
    return min(size, max_rows)


@dataclass(frozen=True)
class GraphKey:
    local_rows: int
    gathered_rows: int  # of every rank


@dataclass(frozen=True)
class GraphBuckets:
    """Sizes of one kind of pass's graphs, for up to max_requests of query_len rows each."""

    max_requests: int
    query_len: int = 1
    piecewise_sizes: tuple[int, ...] = ()  # gathered, of passes in which other ranks prefill

    @property
    def max_rows(self) -> int:
        return self.max_requests * self.query_len

    def gathered(self, largest: int) -> int:  # of every rank, from the largest's rows
        assert 0 < largest <= self.max_rows, f"{largest} rows, graphs go to {self.max_rows}"
        return gathered_size(self.local(largest), self.max_rows)

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
        """Return what a pass needs in which all ranks have a graph, the largest first.

        The others fit into the memory of the first.
        """
        return self._keys({self.gathered(rows) for rows in self._locals if rows})

    def keys_beside_prefill(self) -> tuple[GraphKey, ...]:
        """Return what a pass may need beside, in which another rank prefills."""
        known = {*self.graph_keys()}
        return tuple(key for key in self._keys({*self.piecewise_sizes}) if key not in known)

    @property
    def _locals(self) -> set[int]:
        return {self.local(count * self.query_len) for count in range(self.max_requests + 1)}

    def _keys(self, sizes: set[int]) -> tuple[GraphKey, ...]:
        keys = {GraphKey(rows, size) for size in sizes for rows in self._locals if rows <= size}
        return _largest_first(keys)


def _largest_first(keys: set[GraphKey]) -> tuple[GraphKey, ...]:
    return tuple(sorted(keys, key=lambda key: (-key.gathered_rows, -key.local_rows)))


@dataclass(frozen=True)
class PiecewiseBuckets:
    """Gathered sizes of passes in which some rank prefills; none are captured if max_rows is 0."""

    max_rows: int = 0  # of a rank

    @classmethod
    def for_steps(cls, max_num_tokens: int) -> PiecewiseBuckets:
        return cls(min(max_num_tokens, MAX_PIECEWISE_ROWS))

    @property
    def sizes(self) -> tuple[int, ...]:  # the largest first: the others fit into its memory
        found = {gathered_size(rows, self.max_rows) for rows in range(1, self.max_rows + 1)}
        return tuple(sorted(found, reverse=True))

    def cover(self, largest: int) -> bool:
        return 0 < largest <= self.max_rows

    def gathered(self, largest: int) -> int:  # of every rank, from the largest's rows
        assert self.cover(largest), f"{largest} rows, pieces go to {self.max_rows}"
        return gathered_size(largest, self.max_rows)


@dataclass(frozen=True)
class PieceBuckets:
    """Sizes at which a forward is captured in pieces; none if max_rows is 0."""

    max_rows: int = 0  # of a rank
    exchanges: bool = False  # rows with other ranks, which may have more

    @cached_property
    def keys(self) -> tuple[GraphKey, ...]:  # the largest first: the others fit into its memory
        return _largest_first(
            {
                self.key(min(rows, gathered), gathered)
                for gathered in PiecewiseBuckets(self.max_rows).sizes
                for rows in self.sizes
            }
        )

    def key(self, rows: int, gathered: int) -> GraphKey:
        """Return what serves own rows where so many are gathered of every rank."""
        assert rows <= gathered, f"{rows} own rows, {gathered} are gathered"
        own = min(self.of(rows), gathered)
        return GraphKey(own, gathered if self.exchanges else own)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Return own rows: powers of two, from 256 on with one between; the largest first."""
        powers = [MIN_PIECES << n for n in range(self.max_rows.bit_length())]
        between = [3 * size // 2 for size in powers if size >= FINE_PIECES]
        smaller = {size for size in (*powers, *between) if size < self.max_rows}
        return tuple(sorted(smaller | {self.max_rows} - {0}, reverse=True))

    def of(self, rows: int) -> int:
        assert 0 < rows <= self.max_rows, f"{rows} rows, pieces go to {self.max_rows}"
        return min(size for size in self.sizes if size >= rows)
