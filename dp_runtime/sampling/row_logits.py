"""RowLogits: the logits of rows, and the largest of each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowLogits:
    values: Tensor  # [n, vocab]
    peaks: Tensor  # [n] float32
    best: Tensor  # [n] int64, the first of equal maxima
    valid: Tensor  # [n] bool: no NaN, no +inf, and not all -inf

    @classmethod
    def from_logits(cls, values: Tensor) -> RowLogits:
        if values.is_cuda:
            from dp_runtime.kernels.argmax import row_maxima

            return cls(values, *row_maxima(values))
        peaks, best = values.max(dim=-1)
        return cls(values, peaks.float(), best, peaks.isfinite())

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice) -> RowLogits:
        return RowLogits(self.values[rows], self.peaks[rows], self.best[rows], self.valid[rows])
