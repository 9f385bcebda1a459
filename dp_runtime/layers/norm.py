"""RMSNorm, computed in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467).

    The quotient is rounded to x's dtype before it is scaled, as the models were trained.
    """

    weight: Tensor  # [size], or [heads, size] for one weight per head
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; on a GPU `residual` is overwritten with it."""
        if x.is_cuda:
            from dp_runtime.kernels.norm import add_rms_norm

            normed = add_rms_norm(x, residual, self.weight, self.eps)
            return normed, x if residual is None else residual
        total = x if residual is None else residual + x
        return self(total), total

    def activation_bytes(self, rows: int) -> int:
        """Most bytes a call allocates at once: two in float32, its argument's and the quotient."""
        return rows * self.weight.numel() * 8

    @classmethod
    def load(cls, weights: WeightSource, name: str, size: int, eps: float) -> RMSNorm:
        return cls(weights.load(f"{name}.weight", (size,)), eps)
