"""Penalties, filters and the inverse of the distribution."""

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


def keep_weights(
    logits: Tensor,  # [n, vocab] float32
    peaks: Tensor,  # [n] their maxima
    draws: Array,  # [n, 4] temperature above 0, top_k in 1..vocab, top_p, min_p
) -> Tensor:
    """Weigh the tokens that may be drawn [n, vocab] float32; all others get 0.

    NOTE: softmax, not exp: a vectorised function may round a row's tail differently elsewhere.
    """
    temperature, top_k, top_p, min_p = draws.T
    device = logits.device
    temperatures = on_device(temperature.astype(np.float32), device)
    scaled = (logits - peaks[:, None]) / temperatures[:, None]
    rows = np.flatnonzero(top_k < logits.shape[1])
    counts = top_k[rows].astype(np.int64)
    weights = change_rows(scaled, rows, lambda limited: _keep_top_k(limited, counts)).softmax(-1)
    rows = np.flatnonzero(top_p < 1)
    weights = change_rows(weights, rows, lambda limited: _keep_top_p(limited, top_p[rows]))
    if min_p.any():
        shares = on_device(min_p.astype(np.float32), device)
        weights = weights.masked_fill(weights < (shares * weights.amax(-1))[:, None], 0)
    return weights


def _keep_top_k(logits: Tensor, top_k: Array) -> Tensor:
    best = logits.topk(int(top_k.max())).values
    kth_best = best.gather(1, on_device(top_k - 1, logits.device)[:, None])
    return logits.masked_fill(logits < kth_best, -torch.inf)


def _keep_top_p(weights: Tensor, top_p: Array) -> Tensor:
    ordered, ids = weights.sort(dim=-1, descending=True, stable=True)
    sums = ordered.cumsum(-1, dtype=torch.float64)
    goals = on_device(top_p, weights.device)[:, None] * sums[:, -1:]
    ordered[:, 1:].masked_fill_(sums[:, :-1] >= goals, 0)
    return torch.empty_like(weights).scatter_(1, ids, ordered)


def invert(
    weights: Tensor,  # [n, vocab] float32
    uniforms: Tensor,  # [n] float64 in [0, 1)
    fallback: Tensor,  # [n] int64 of positive weight, where rounding is not monotonic
) -> Tensor:
    """Find where cumulative weights pass uniforms * their sum; NaN weights get the fallback."""
    sums = weights.cumsum(-1, dtype=torch.float64)
    goals = uniforms[:, None] * sums[:, -1:]
    tokens = torch.searchsorted(sums, goals, right=True).clamp_(max=weights.shape[1] - 1)
    return torch.where(weights.gather(1, tokens) > 0, tokens, fallback[:, None]).squeeze(1)


def take_rows(matrix: Tensor, rows: Array) -> Tensor:  # rows ascend
    return matrix if len(rows) == len(matrix) else matrix[on_device(rows, matrix.device)]


def change_rows(matrix: Tensor, rows: Array, change: Callable[[Tensor], Tensor]) -> Tensor:
    if not len(rows):
        return matrix
    changed = change(take_rows(matrix, rows))
    if len(rows) == len(matrix):
        return changed
    return matrix.index_copy(0, on_device(rows, matrix.device), changed)
