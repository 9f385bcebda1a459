"""RMSNorm, alone or with the residual sum before it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dp_runtime.core.qk_norm_rope import rms_norm
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False)
class RMSNorm:
    weight: Tensor  # [size], or [heads, size] for one weight per head; see `rms_norm`
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Add x to `residual` in place; return the norm of that sum, and the sum itself.

        Without a residual x is the sum, and the next `add` overwrites it.
        """
        if x.is_cuda:
            from dp_runtime.kernels.norm import add_rms_norm

            normed = add_rms_norm(x, residual, self.weight, self.eps)
            return normed, x if residual is None else residual
        total = x if residual is None else residual.add_(x)
        return self(total), total

    def activation_bytes(self, rows: int) -> int:
        """Count two tensors in float32, its argument's and the quotient, at once."""
        return rows * self.weight.numel() * 8

    @classmethod
    def load(cls, weights: WeightSource, name: str, size: int, eps: float) -> RMSNorm:
        return cls(weights.load(f"{name}.weight", (size,)), eps)

    @classmethod
    def load_zero_centered(cls, weights: WeightSource, name: str, size: int, eps: float) -> RMSNorm:
        """Load a norm that multiplies by 1 + weight, in float32."""
        return cls(1 + weights.float32(f"{name}.weight", (size,)), eps)
