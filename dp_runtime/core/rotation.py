"""QkNormRope: what queries and keys of a layer go through before attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class QkNormRope:
    """What a layer's query and key heads go through: an RMSNorm each, then their rotation."""

    norm_weight: Tensor | None  # [num_heads + num_kv_heads, head_dim]; None: no norm
    eps: float
    cos: Tensor  # [rows, 1, head_dim / 2]
    sin: Tensor  # [rows, 1, head_dim / 2]
