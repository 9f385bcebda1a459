"""Attention layer: projections, q/k norm and rotary embedding around a paged backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.attention.backend import PagedAttention
from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.plan import AttentionPlan
from dp_runtime.core.qk_norm_rope import CosSin, QkNormRope
from dp_runtime.layers.linear import Projection, load_projection
from dp_runtime.layers.norm import RMSNorm
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True)
class AttentionShape:
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool
    qk_norm_eps: float | None


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal self-attention of this rank's own rows, [rows, inputs] -> [rows, hidden]."""

    qkv: Projection  # q, k and v stacked
    qk_norm: RMSNorm | None  # [num_heads + num_kv_heads, head_dim]
    output: Projection
    kv_writer: KvWriter
    paged: PagedAttention
    shape: AttentionShape

    def __call__(self, x: Tensor, cos_sin: CosSin, plan: AttentionPlan) -> Tensor:
        heads = self.shape.num_heads + 2 * self.shape.num_kv_heads
        qkv = self.qkv(x).view(x.shape[0], heads, self.shape.head_dim)
        q = self.kv_writer.write(qkv, self._rotation(cos_sin), plan)
        return self.output(self.paged.run(q, plan).flatten(1))

    def _rotation(self, cos_sin: CosSin) -> QkNormRope:
        norm = self.qk_norm
        weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
        return QkNormRope(weight, eps, *cos_sin)

    def activation_bytes(self, rows: int) -> int:
        """Count the most bytes a call allocates; a backend is taken to copy q, k and v once."""
        shape, size = self.shape, self.output.dtype.itemsize
        q = rows * shape.num_heads * shape.head_dim * size
        kv = rows * shape.num_kv_heads * shape.head_dim * size
        normed = 0 if self.qk_norm is None else q + kv
        norm = 0 if self.qk_norm is None else self.qk_norm.activation_bytes(rows)
        rotation = 2 * (q + kv)  # four halves
        attended = q + kv + q + max(q + 2 * kv, self.output.activation_bytes(rows))
        return self.qkv.activation_bytes(rows) + max(norm, normed + rotation, attended)

    @classmethod
    def load(
        cls,
        shape: AttentionShape,
        weights: WeightSource,
        prefix: str,
        paged: PagedAttention,
        input_size: int | None = None,  # by default hidden_size
    ) -> Attention:
        q_size = shape.num_heads * shape.head_dim
        kv_size = shape.num_kv_heads * shape.head_dim
        sizes = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        parts = {f"{prefix}.{name}": size for name, size in sizes.items()}
        hidden = shape.hidden_size
        return cls(
            qkv=load_projection(weights, parts, input_size or hidden, shape.bias),
            qk_norm=load_qk_norm(shape, weights, prefix),
            output=load_projection(weights, {f"{prefix}.o_proj": hidden}, q_size, shape.bias),
            kv_writer=KvWriter(paged.cache),
            paged=paged,
            shape=shape,
        )


def load_qk_norm(shape: AttentionShape, weights: WeightSource, prefix: str) -> RMSNorm | None:
    """Load the norms of q and k as one over all their heads."""
    if shape.qk_norm_eps is None:
        return None
    q, k = (weights.load(f"{prefix}.{name}_norm.weight", (shape.head_dim,)) for name in "qk")
    heads = (q.expand(shape.num_heads, -1), k.expand(shape.num_kv_heads, -1))
    return RMSNorm(torch.cat(heads), shape.qk_norm_eps)
