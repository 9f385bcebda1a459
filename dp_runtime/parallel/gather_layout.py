"""GatherLayout: where ranks' rows lie among those that a captured MoE stage gathers."""

from __future__ import annotations

from dataclasses import dataclass

from dp_runtime.parallel.padding import PaddingPlan

SMALLEST = 16  # gathered rows of a part
FACTOR = 4  # between gathered sizes: few are needed, since kernels read the real counts


@dataclass(frozen=True)
class GatherLayout:
    """Parts as large as the largest rank's rows; or all packed into one, by their sum."""

    packed_ranks: int = 1  # how many ranks share one part: dp_size if packed
    factor: int = FACTOR
    max_rank_rows: int | None = None  # that any rank has in any pass; needed if packed

    @classmethod
    def packed(cls, dp_size: int, max_rank_rows: int, factor: int = 2) -> GatherLayout:
        return cls(dp_size, factor, max_rank_rows)

    def size(self, total: int, largest: int, max_rows: int) -> int:  # from all ranks' rows
        rows = largest if self.packed_ranks == 1 else max(total, largest)
        return self._size(-(-rows // self.packed_ranks), max_rows)

    def sizes(self, max_rows: int) -> tuple[int, ...]:  # the largest first
        return tuple(
            sorted({self._size(n, max_rows) for n in range(1, max_rows + 1)}, reverse=True)
        )

    def _size(self, rows: int, max_rows: int) -> int:
        size = max(SMALLEST // self.packed_ranks, 1)
        while size < rows:
            size *= self.factor
        return min(size, max_rows)

    def most_rows(self, size: int) -> int:  # of one rank
        if self.packed_ranks == 1:
            return size
        assert self.max_rank_rows is not None, "a packed layout says how many rows a rank has"
        return min(size * self.packed_ranks, self.max_rank_rows)

    def plan(self, real_rows: tuple[int, ...], size: int, counted: bool) -> PaddingPlan:
        if self.packed_ranks == 1:
            return PaddingPlan(real_rows, (size,) * len(real_rows), counted)
        assert counted, "packed rows are counted on the device"
        rest = size * len(real_rows) - sum(real_rows)
        return PaddingPlan(real_rows, (*real_rows[:-1], real_rows[-1] + rest), counted)


PARTS = GatherLayout()
