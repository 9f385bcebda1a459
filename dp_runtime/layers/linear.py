"""Linear: a dense matrix, possibly several of the checkpoint's stacked into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True, eq=False)
class Linear:
    """x [rows, inputs] -> x @ weight.T + bias, [rows, outputs]."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def activation_bytes(self, rows: int) -> int:
        return rows * self.weight.shape[0] * self.weight.dtype.itemsize

    @classmethod
    def load(
        cls, weights: WeightSource, outputs: Mapping[str, int], inputs: int, bias: bool = False
    ) -> Linear:
        """Stack modules (name -> output size), each read into its place, so memory peaks at one."""
        total = sum(outputs.values())
        weight = torch.empty(total, inputs, dtype=weights.dtype, device=weights.device)
        biases = weight.new_empty(total) if bias else None
        start = 0
        for name, size in outputs.items():
            weight[start : start + size] = weights.load(f"{name}.weight", (size, inputs))
            if biases is not None:
                biases[start : start + size] = weights.load(f"{name}.bias", (size,))
            start += size
        return cls(weight, biases)
