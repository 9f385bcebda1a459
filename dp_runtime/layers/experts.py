"""A rank's experts: their shard, their stacked weights, and the function that runs them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dp_runtime.core.e4m3 import E4M3
from dp_runtime.layers.expert_layouts import ExpertNames, ExpertShape, StoredMatrix, locate_experts
from dp_runtime.weights.fp8_blocks import ExpertScales, scale_shape
from dp_runtime.weights.source import Shape, WeightSource

ALIGNMENT = 8  # elements: grouped_mm wants strides of 16 bytes, also in 2-byte dtypes
PAIRS_AT_ONCE = 16_384  # (row, expert) pairs; bounds what the products need, whatever the routing


@dataclass(frozen=True)
class ExpertShard:
    """The part of every MoE layer that one rank holds; either range may be empty."""

    experts: range
    intermediate: range

    @property
    def is_empty(self) -> bool:
        return not self.experts or not self.intermediate


def aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def balanced_part(whole: range, index: int, parts: int) -> range:
    return whole[len(whole) * index // parts : len(whole) * (index + 1) // parts]


@dataclass(frozen=True, eq=False)
class Experts:
    """A rank's slices of the experts' matrices; with scales they are e4m3 (`reads_fp8`)."""

    gate_up: Tensor  # [local_experts, 2 * aligned_intermediate, hidden]
    down: Tensor  # [local_experts, hidden, aligned_intermediate]
    first_expert: int
    scales: ExpertScales | None = None

    def __call__(self, rows: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        assert self.scales is None, "grouped products read no e4m3 weights"
        return fused_experts(
            rows, self.gate_up, self.down, topk_ids, topk_weights, self.first_expert
        )

    def activation_bytes(self, rows: int, top_k: int) -> int:
        """Count the most bytes a call allocates at once, if all choices are local."""
        num_local, hidden, inner = self.down.shape
        size = self.down.dtype.itemsize
        if num_local == 0:
            return rows * hidden * size
        pairs = rows * top_k
        order = pairs * 3 * 8  # sorted expert ids, their order, and the rows
        products = (hidden + 2 * inner + max(2 * inner, inner + hidden)) * size
        weighted = hidden * (size + 4)
        widest = min(pairs, PAIRS_AT_ONCE) * max(products, weighted)
        return order + rows * hidden * 4 + max(widest, rows * hidden * size)

    @classmethod
    def load(
        cls,
        weights: WeightSource,
        prefix: str,
        names: ExpertNames,
        shape: ExpertShape,
        shard: ExpertShard,
        fp8: bool = False,
    ) -> Experts:
        """Read this shard's slices, each into its place; fp8: they are e4m3 and stay so."""
        stored, hidden = locate_experts(weights, prefix, names, shape), shape.hidden
        weights.leave({n for expert in range(shape.num_experts) for n in stored(expert).names})
        part, whole = slice(shard.intermediate.start, shard.intermediate.stop), slice(0, hidden)
        inner = aligned(len(shard.intermediate))
        count = 0 if shard.is_empty else len(shard.experts)
        gate_up = _Stack.zeros(weights, (count, 2, inner, hidden), fp8)
        down = _Stack.zeros(weights, (count, hidden, inner), fp8)
        for local, expert in enumerate(shard.experts[:count]):
            matrices = stored(expert)
            gate_up.fill((local, 0), weights, matrices.gate, part, whole)
            gate_up.fill((local, 1), weights, matrices.up, part, whole)
            down.fill((local,), weights, matrices.down, whole, part)
        scales = None
        if gate_up.scales is not None and down.scales is not None:
            scales = ExpertScales(gate_up.scales.flatten(1, 2), down.scales)
        return cls(gate_up.values.flatten(1, 2), down.values, shard.experts.start, scales)


@dataclass(frozen=True, eq=False)
class _Stack:
    """Matrices that are being filled; what no slice fills stays zero."""

    values: Tensor  # [..., outputs, inputs]
    scales: Tensor | None  # [..., blocks of outputs, blocks of inputs]

    @classmethod
    def zeros(cls, weights: WeightSource, shape: Shape, fp8: bool) -> _Stack:
        if not fp8:
            return cls(torch.zeros(shape, dtype=weights.dtype, device=weights.device), None)
        return cls(
            torch.zeros(shape, dtype=E4M3, device=weights.device),
            torch.zeros(scale_shape(shape), dtype=torch.float32, device=weights.device),
        )

    def fill(
        self,
        at: tuple[int, ...],
        weights: WeightSource,
        stored: StoredMatrix,
        rows: slice,
        columns: slice,
    ) -> None:
        name, shape, part = stored.name, stored.shape, stored.part(rows, columns)
        if self.scales is None:
            matrix = weights.load(name, shape, part)
        else:
            matrix, scales = weights.load_fp8(name, shape, part)
            self.scales[at] = scales.flatten(0, -2)
        matrix = matrix.flatten(0, -2)
        self.values[at][: matrix.shape[0], : matrix.shape[1]] = matrix


def fused_experts(
    rows: Tensor,
    gate_up: Tensor,
    down: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    first_expert: int,
) -> Tensor:
    """Sum weight * down(silu(gate(row)) * up(row)) over the local experts that a row chose.

    rows [n, hidden], topk_ids and topk_weights [n, k] -> [n, hidden], summed in float32.
    """
    num_local = gate_up.shape[0]
    if num_local == 0:
        return torch.zeros_like(rows)
    expert, order = topk_ids.flatten().sort(stable=True)
    local_ids = torch.arange(first_expert, first_expert + num_local + 1, device=rows.device)
    bounds = torch.searchsorted(expert, local_ids)
    first, last = int(bounds[0]), int(bounds[-1])
    total = torch.zeros(rows.shape, dtype=torch.float32, device=rows.device)
    for start in range(first, last, PAIRS_AT_ONCE):
        stop = min(start + PAIRS_AT_ONCE, last)
        ends = (bounds[1:].clamp(start, stop) - start).to(torch.int32)
        pair = order[start:stop]
        row = pair // topk_ids.shape[1]
        weight = topk_weights.flatten()[pair, None].float()
        total.index_add_(0, row, _products(rows[row], gate_up, down, ends) * weight)
    return total.to(rows.dtype)


def _products(pairs: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
    """Multiply pairs [n, hidden] in the order of their experts; ends [local] int32, cumulative."""
    gate, up = F.grouped_mm(pairs, gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
    return F.grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
