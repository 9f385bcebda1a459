"""Linear: a dense matrix, possibly several of the checkpoint's stacked into one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.dense_linear.measured import FewRowsTiles
from dp_runtime.kernels.dense_linear.tiles import DenseTile
from dp_runtime.kernels.fp8_linear.tiles import (
    GROUP,
    NUM_COUNTERS,
    choose_tile,
    interleave,
    product_bytes,
)
from dp_runtime.weights.fp8_blocks import BLOCK, num_blocks
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True)
class Widened:
    """An e4m3 matrix that could not stay so."""

    name: str
    why: str
    num_bytes: int  # that it takes now


@dataclass(frozen=True, eq=False)
class Linear:
    """x [rows, inputs] -> x @ weight.T + bias, [rows, outputs]."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None
    widened: tuple[Widened, ...] = ()  # of what its source keeps in e4m3

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)

    def first(self, outputs: int) -> Linear:
        """Keep the first outputs only, in the same memory."""
        if outputs == self.shape[0]:
            return self
        return Linear(self.weight[:outputs], None if self.bias is None else self.bias[:outputs])

    @property
    def shape(self) -> tuple[int, int]:  # outputs, inputs
        outputs, inputs = self.weight.shape
        return outputs, inputs

    @property
    def dtype(self) -> torch.dtype:  # of rows
        return self.weight.dtype

    def activation_bytes(self, rows: int) -> int:
        return rows * self.shape[0] * self.dtype.itemsize

    @classmethod
    def load(
        cls, weights: WeightSource, outputs: Mapping[str, int], inputs: int, bias: bool = False,
        why: str = "it is read in the model's dtype alone",
    ) -> Linear:  # fmt: skip
        """Stack modules (name -> output size), each read into place; `why` e4m3 is widened."""
        total = sum(outputs.values())
        weight = torch.empty(total, inputs, dtype=weights.dtype, device=weights.device)
        biases = weight.new_empty(total) if bias else None
        start = 0
        for name, size in outputs.items():
            weight[start : start + size] = weights.load(f"{name}.weight", (size, inputs))
            if biases is not None:
                biases[start : start + size] = weights.load(f"{name}.bias", (size,))
            start += size
        row = inputs * weights.dtype.itemsize
        widened = tuple(
            Widened(name, why, size * row)
            for name, size in outputs.items()
            if weights.keeps_fp8(f"{name}.weight")
        )
        return cls(weight, biases, widened)

    def ordered(self, order: Tensor | None) -> Linear:
        """Copy it with its outputs in another order, [outputs]."""
        if order is None:
            return self
        order = order.to(self.weight.device)
        bias = None if self.bias is None else self.bias[order]
        return Linear(self.weight[order], bias, self.widened)


@dataclass(frozen=True, eq=False)
class Fp8Linear:
    """The same of an e4m3 matrix; outputs beyond it are those of a matrix that is not e4m3."""

    weight: Tensor  # [outputs, inputs] e4m3, interleaved
    scales: Tensor  # [blocks of inputs, outputs] float32, so that outputs may have any order
    counters: Tensor  # [NUM_COUNTERS] int32, for the kernel
    dtype: torch.dtype
    rest: Linear | None  # [other outputs, inputs]

    def __call__(self, x: Tensor) -> Tensor:
        return self.into(x, x.new_empty(len(x), self.shape[0]))

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        from dp_runtime.kernels.fp8_linear.run import multiply, widened

        outputs, inputs = self.weight.shape
        own, tile = out[:, :outputs], choose_tile(max(len(x), 1), outputs, inputs)
        if tile is None:
            torch.mm(x, widened(self.weight, self.scales, x.dtype).t(), out=own)
        elif len(x):
            multiply(x, self.weight, self.scales, own, self.counters, tile)
        if self.rest is not None:
            self.rest.into(x, out[:, outputs:])
        return out

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.weight.shape
        return outputs + (0 if self.rest is None else self.rest.shape[0]), inputs

    def activation_bytes(self, rows: int) -> int:
        beside = product_bytes(rows, *self.weight.shape)
        return rows * self.shape[0] * self.dtype.itemsize + beside

    @classmethod
    def load(
        cls,
        weights: WeightSource,
        outputs: Mapping[str, int],
        rest: Mapping[str, int],
        inputs: int,
        order: Tensor | None,
    ) -> Fp8Linear:
        """Stack e4m3 modules, and the rest; order: of all outputs, the rest's last."""
        total, device = sum(outputs.values()), weights.device
        weight = torch.empty(total, inputs, dtype=E4M3, device=device)
        scales = torch.empty(num_blocks(inputs), total, device=device)
        start = 0
        for name, size in outputs.items():
            place = slice(start, start + size)
            values, blocks = weights.load_fp8(f"{name}.weight", (size, inputs))
            weight[place] = interleave(values)
            scales[:, place] = blocks.repeat_interleave(BLOCK, 0)[:size].t()
            start += size
        wide = Linear.load(weights, rest, inputs, why=BEHIND) if rest else None
        if order is not None:
            own = order[:total].to(device)
            weight, scales = weight.view(torch.uint8)[own].view(E4M3), scales[:, own]
            wide = None if wide is None else wide.ordered(order[total:] - total)
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=device)
        return cls(weight, scales.contiguous(), counters, weights.dtype, wide)


@dataclass(frozen=True, eq=False)
class FewRowsLinear:
    """The same, by a kernel of ours where that was measured to be faster."""

    linear: Linear  # without a bias
    tiles: FewRowsTiles
    counters: Tensor  # [NUM_COUNTERS] int32, for the kernel

    def __call__(self, x: Tensor) -> Tensor:
        tile = self.tiles.choose(len(x))
        if tile is None:
            return self.linear(x)
        return self._multiply(x, x.new_empty(len(x), self.shape[0]), tile)

    def into(self, x: Tensor, out: Tensor) -> Tensor:
        tile = self.tiles.choose(len(x))
        return self.linear.into(x, out) if tile is None else self._multiply(x, out, tile)

    def _multiply(self, x: Tensor, out: Tensor, tile: DenseTile) -> Tensor:
        from dp_runtime.kernels.dense_linear.run import multiply

        return multiply(x, self.weight, out, self.counters, tile)

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.linear.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.linear.dtype

    def activation_bytes(self, rows: int) -> int:
        return self.linear.activation_bytes(rows) + self.tiles.sum_bytes(rows)

    @classmethod
    def of(cls, linear: Linear) -> Linear | FewRowsLinear:
        tiles = FewRowsTiles.of(*linear.shape)
        if linear.bias is not None or not tiles.tiles:
            return linear
        counters = torch.zeros(NUM_COUNTERS, dtype=torch.int32, device=linear.weight.device)
        return cls(linear, tiles, counters)


Projection = Linear | Fp8Linear | FewRowsLinear
BEHIND, MIXED = (f"it is stacked {how} one that is not e4m3" for how in ("behind", "in turns with"))


def load_projection(
    weights: WeightSource,
    outputs: Mapping[str, int],
    inputs: int,
    bias: bool = False,
    order: Tensor | None = None,
) -> Projection:
    """Stack modules as `Linear.load`; the first ones stay e4m3 if the source keeps them so.

    None does with a bias, with inputs that are no multiple of 16, or if the order mixes both kinds.
    order: of the outputs, [outputs].
    """
    if bias or inputs % GROUP:
        why = "it has a bias" if bias else f"it has {inputs} inputs, no multiple of {GROUP}"
        return Linear.load(weights, outputs, inputs, bias, why).ordered(order)
    kept: dict[str, int] = {}
    for name, size in outputs.items():
        if not weights.keeps_fp8(f"{name}.weight"):
            break
        kept[name] = size
    total = sum(kept.values())
    if not kept or (order is not None and bool((order[:total] >= total).any())):
        why = MIXED if kept else BEHIND
        linear = Linear.load(weights, outputs, inputs, why=why).ordered(order)
        return FewRowsLinear.of(linear) if weights.few_rows_kernel else linear
    rest = {name: size for name, size in outputs.items() if name not in kept}
    return Fp8Linear.load(weights, kept, rest, inputs, order)
