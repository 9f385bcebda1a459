"""Penalties, and the filters of what may be drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp_runtime.core.device_copy import on_device

Array = NDArray[Any]


def penalise(
    logits: Tensor,  # [n, vocab], as in_prompt and counts
    in_prompt: Tensor,
    counts: Tensor,
    settings: Tensor,
) -> Tensor:
    """Penalise logits; settings [n, 3] are repetition, frequency, presence."""
    repetition, frequency, presence = settings.unsqueeze(-1).unbind(1)
    in_output = counts > 0
    repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | in_output, repeated, logits)
    return logits - frequency * counts - presence * in_output


def keep_logits(
    logits: Tensor,  # [n, vocab] float32
    peaks: Tensor,  # [n] their maxima
    draws: Array,  # [n, 4] temperature above 0, top_k in 1..vocab, top_p, min_p
) -> Tensor:
    """Return logits [n, vocab] float32 to draw from, up to a constant; -inf may not be drawn.

    The largest is 0 and stays, since no filter takes a peak.
    """
    temperature, top_k, top_p, min_p = draws.T
    temperatures = on_device(temperature.astype(np.float32), logits.device)
    kept = (logits - peaks[:, None]) / temperatures[:, None]
    rows = np.flatnonzero(top_k < logits.shape[1])
    counts = top_k[rows].astype(np.int64)
    kept = change_rows(kept, rows, lambda limited: _keep_top_k(limited, counts))
    nuclei = np.flatnonzero(top_p < 1)
    kept = change_rows(kept, nuclei, lambda limited: _keep_top_p(limited, top_p[nuclei]))
    if min_p.any():
        least = np.log(min_p, out=np.full_like(min_p, -np.inf), where=min_p > 0)
        floors = on_device(least.astype(np.float32), logits.device)
        kept = kept.masked_fill(kept < floors[:, None], -torch.inf)
    return kept


def _keep_top_k(logits: Tensor, top_k: Array) -> Tensor:
    best = logits.topk(int(top_k.max())).values
    kth_best = best.gather(1, on_device(top_k - 1, logits.device)[:, None])
    return logits.masked_fill(logits < kth_best, -torch.inf)


def _keep_top_p(logits: Tensor, top_p: Array) -> Tensor:
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    sums = ordered.softmax(-1).cumsum(-1, dtype=torch.float64)
    goals = on_device(top_p, logits.device)[:, None] * sums[:, -1:]
    ordered[:, 1:].masked_fill_(sums[:, :-1] >= goals, -torch.inf)
    return torch.empty_like(logits).scatter_(1, ids, ordered)


def take_rows(matrix: Tensor, rows: Array) -> Tensor:  # rows ascend
    return matrix if len(rows) == len(matrix) else matrix[on_device(rows, matrix.device)]


def change_rows(matrix: Tensor, rows: Array, change: Callable[[Tensor], Tensor]) -> Tensor:
    if not len(rows):
        return matrix
    changed = change(take_rows(matrix, rows))
    if len(rows) == len(matrix):
        return changed
    return matrix.index_copy(0, on_device(rows, matrix.device), changed)
