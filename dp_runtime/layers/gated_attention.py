"""GatedAttention: attention whose result is multiplied by a sigmoid of the same input."""

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
from dp_runtime.layers.rotary import dim_order
from dp_runtime.weights.source import WeightSource


@dataclass(frozen=True)
class GatedAttentionShape:
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotated: int  # dimensions of a head
    qk_norm_eps: float

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, eq=False)
class GatedAttention:
    """Causal self-attention of this rank's own rows, [rows, hidden] -> [rows, hidden].

    Dimensions of queries and keys are in `rotary.dim_order`, so that any kernel that rotates whole
    heads serves a model that rotates a part of them.
    """

    qkv_gate: Projection  # q, k, v and the gate stacked
    qk_norm: RMSNorm  # [num_heads + num_kv_heads, head_dim]
    output: Projection
    kv_writer: KvWriter
    paged: PagedAttention
    shape: GatedAttentionShape

    def __call__(self, x: Tensor, cos_sin: CosSin, plan: AttentionPlan) -> Tensor:
        shape, norm = self.shape, self.qk_norm
        qkv, gate = self.qkv_gate(x).tensor_split([shape.q_size + 2 * shape.kv_size], 1)
        heads = qkv.view(x.shape[0], shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim)
        q = self.kv_writer.write(heads, QkNormRope(norm.weight, norm.eps, *cos_sin), plan)
        return self.output(_gated(self.paged.run(q, plan).flatten(1), gate))

    def activation_bytes(self, rows: int) -> int:
        """Count the most bytes a call allocates; a backend is taken to copy q, k and v once."""
        shape, size = self.shape, self.output.dtype.itemsize
        q, kv = rows * shape.q_size * size, rows * shape.kv_size * size
        rotation = q + kv + 2 * (q + kv)  # normed, and four halves
        attended = q + kv + q + max(q + 2 * kv, q + q, self.output.activation_bytes(rows))
        norm = self.qk_norm.activation_bytes(rows)
        return self.qkv_gate.activation_bytes(rows) + max(norm, rotation, attended)

    @classmethod
    def load(
        cls, shape: GatedAttentionShape, weights: WeightSource, prefix: str, paged: PagedAttention
    ) -> GatedAttention:
        hidden = shape.hidden_size
        return cls(
            qkv_gate=_load_qkv_gate(shape, weights, prefix),
            qk_norm=_load_qk_norm(shape, weights, prefix),
            output=load_projection(weights, {f"{prefix}.o_proj": hidden}, shape.q_size),
            kv_writer=KvWriter(paged.cache),
            paged=paged,
            shape=shape,
        )


def _gated(attended: Tensor, gate: Tensor) -> Tensor:
    if not gate.is_cuda:
        return attended * gate.sigmoid()
    from dp_runtime.kernels.gates import multiply_gate

    return multiply_gate(attended, gate, silu=False)


def _load_qkv_gate(shape: GatedAttentionShape, weights: WeightSource, prefix: str) -> Projection:
    """Stack q, k, v and the gate; the checkpoint has query and gate head by head in q_proj."""
    q_size, kv_size, dim = shape.q_size, shape.kv_size, shape.head_dim
    order = dim_order(shape.rotated, dim)
    sizes = {"q_proj": 2 * q_size, "k_proj": kv_size, "v_proj": kv_size}
    both, k, v = torch.arange(2 * q_size + 2 * kv_size).tensor_split(
        [2 * q_size, 2 * q_size + kv_size]
    )
    q, gate = both.view(shape.num_heads, 2, dim).unbind(1)
    rows = torch.cat(
        [q[:, order].flatten(), k.view(-1, dim)[:, order].flatten(), v, gate.flatten()]
    )
    parts = {f"{prefix}.{name}": size for name, size in sizes.items()}
    return load_projection(weights, parts, shape.hidden_size, order=rows)


def _load_qk_norm(shape: GatedAttentionShape, weights: WeightSource, prefix: str) -> RMSNorm:
    order = dim_order(shape.rotated, shape.head_dim).to(weights.device)
    dim, eps = shape.head_dim, shape.qk_norm_eps
    q, k = (RMSNorm.load_zero_centered(weights, f"{prefix}.{n}_norm", dim, eps) for n in "qk")
    heads = (q.weight.expand(shape.num_heads, -1), k.weight.expand(shape.num_kv_heads, -1))
    return RMSNorm(torch.cat(heads)[:, order].contiguous(), eps)
