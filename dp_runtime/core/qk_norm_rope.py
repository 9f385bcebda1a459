"""QkNormRope: norm and rotation of query and key heads before attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CosSin = tuple[Tensor, Tensor]  # [rows, 1, head_dim / 2] each


@dataclass(frozen=True, eq=False)
class QkNormRope:
    """An RMSNorm of each query and key head, if the layer has one, then the rotary embedding."""

    norm_weight: Tensor | None  # [num_heads + num_kv_heads, head_dim], as for `rms_norm`
    eps: float
    cos: Tensor  # [rows, 1, head_dim / 2]
    sin: Tensor  # [rows, 1, head_dim / 2]

    def __call__(self, qk: Tensor) -> Tensor:  # [rows, num_heads + num_kv_heads, head_dim]
        if self.norm_weight is not None:
            qk = rms_norm(qk, self.norm_weight, self.eps)
        return rotate(qk, (self.cos, self.sin))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight (arXiv 1910.07467).

    The quotient is rounded to the weight's dtype, as in training; float32 has one rounding less.
    """
    quotient = F.rms_norm(x.float(), x.shape[-1:], eps=eps)
    return (weight * quotient.to(weight.dtype)).to(x.dtype)


def rotate(x: Tensor, cos_sin: CosSin) -> Tensor:
    """Rotate the halves of [rows, heads, head_dim] against each other (the NeoX layout)."""
    cos, sin = cos_sin
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
