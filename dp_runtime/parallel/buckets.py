"""Sizes at which graphs are captured; the same on all ranks."""

from __future__ import annotations

from dataclasses import dataclass

OWN_STEP = 16  # above it, own rows are captured in multiples of it
LEAST_GATHERED = 16
GATHERED_FACTOR = 4  # between gathered sizes: few of them, for kernels read the real counts
MOST_STAGE_ROWS = 2048  # of a rank; a GPU takes longer for more than a host that launches them


def _gathered(largest: int, most: int) -> int:
    bucket = LEAST_GATHERED
    while bucket < largest:
        bucket *= GATHERED_FACTOR
    return min(bucket, most)


@dataclass(frozen=True)
class GraphKey:
    """The sizes a graph is captured at."""

    own_rows: int
    gathered_rows: int  # of every rank


@dataclass(frozen=True)
class GraphBuckets:
    """Sizes for which there are graphs of one kind of pass, up to `most` requests of a rank.

    query_len: rows of each request.
    """

    most: int
    query_len: int = 1

    @property
    def most_rows(self) -> int:
        return self.most * self.query_len

    def gathered(self, largest: int) -> int:
        """The gathered rows of every rank where the largest rank has so many."""
        assert 0 < largest <= self.most_rows, f"{largest} rows, graphs go to {self.most_rows}"
        return _gathered(self.own(largest), self.most_rows)

    def own(self, rows: int) -> int:
        """The own rows of the graph that serves so many."""
        assert 0 <= rows <= self.most_rows, f"{rows} rows, graphs go to {self.most_rows}"
        return self._requests(-(-rows // self.query_len)) * self.query_len

    def _requests(self, count: int) -> int:
        if count <= 2:
            return count
        if count <= OWN_STEP:
            return min(1 << (count - 1).bit_length(), self.most)
        return min(-(-count // OWN_STEP) * OWN_STEP, self.most)

    def graph_keys(self) -> tuple[GraphKey, ...]:
        """Every key a step may need, the largest first: the others fit into its memory."""
        owns = {self.own(count * self.query_len) for count in range(self.most + 1)}
        sizes = {self.gathered(own) for own in owns if own}
        keys = {GraphKey(own, size) for size in sizes for own in owns if own <= size}
        return tuple(sorted(keys, key=lambda key: (-key.gathered_rows, -key.own_rows)))


@dataclass(frozen=True)
class StageBuckets:
    """Gathered sizes for which MoE stages are captured alone, up to `most` rows of a rank."""

    most: int

    @classmethod
    def of(cls, max_num_tokens: int) -> StageBuckets:
        """For ranks whose steps have so many rows at most."""
        return cls(min(max_num_tokens, MOST_STAGE_ROWS))

    @classmethod
    def none(cls) -> StageBuckets:
        """No stage is captured."""
        return cls(0)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The largest first: the others fit into its memory."""
        return tuple(
            sorted({_gathered(n, self.most) for n in range(1, self.most + 1)}, reverse=True)
        )

    def gathered(self, largest: int) -> int | None:
        """The gathered rows of every rank where the largest has so many; None: no stage is."""
        return _gathered(largest, self.most) if 0 < largest <= self.most else None
