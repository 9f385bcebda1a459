"""float8_e4m3fn, the 8-bit format of quantised KV caches and weights."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


def quantize(x: Tensor, scale: float | Tensor) -> Tensor:
    """Round x / scale to e4m3 and clamp it to the largest e4m3 value."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)
