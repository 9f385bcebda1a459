"""PartialSums: what one rank's experts contribute to every gathered row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class PartialSums:
    """A row of a rank's partial sums is the sum of the row's terms, one for each chosen expert.

    Terms are added in float32, in their order, and the sum is rounded to their dtype. Whoever sends
    a row can add its terms on the way.
    """

    terms: Tensor  # [rows * k, hidden]
    local_ids: Tensor | None = None  # [rows, k] int32, -1: not a term; None: terms are the rows

    @property
    def num_rows(self) -> int:
        return len(self.terms if self.local_ids is None else self.local_ids)

    def rows(self) -> Tensor:
        """The sums, [rows, hidden]; 0 where a row has no term."""
        if self.local_ids is None:
            return self.terms
        from dp_runtime.layers.triton_experts import sum_pairs

        return sum_pairs(self.terms, self.local_ids)
