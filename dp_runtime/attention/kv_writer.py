"""KvWriter: norms, rotates and appends a layer's new keys and values before attention runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dp_runtime.attention.plan import AttentionPlan, LayerCache
from dp_runtime.core.e4m3 import E4M3, quantize
from dp_runtime.core.qk_norm_rope import QkNormRope


@dataclass(frozen=True, eq=False)
class KvWriter:
    cache: LayerCache

    def write(self, qkv: Tensor, rotation: QkNormRope, plan: AttentionPlan) -> Tensor:
        """Norm, rotate and append qkv [rows, num_heads + 2 * num_kv_heads, head_dim]; return q.

        q lies where the plan has queries, if it says so.
        """
        self._check(qkv, rotation, plan)
        num_heads, num_kv_heads = plan.spec.num_heads, plan.spec.num_kv_heads
        if plan.num_tokens == 0:
            return qkv[:, :num_heads]
        if qkv.is_cuda:
            return self.write_fused(qkv, rotation, plan)
        qk, v = qkv.tensor_split([num_heads + num_kv_heads], 1)
        q, k = rotation(qk).tensor_split([num_heads], 1)
        self._store(k, v, plan)
        return q if plan.queries is None else plan.queries.copy_(q)

    def write_fused(self, qkv: Tensor, rotation: QkNormRope, plan: AttentionPlan) -> Tensor:
        """Do all of `write` in one Triton kernel, for at least one row."""
        from dp_runtime.kernels.kv_append import rotate_and_append

        scales = self.cache.scales
        return rotate_and_append(
            self._storage(), plan.slots.mapping, qkv, rotation, scales.k, scales.v, plan.queries
        )

    def append(self, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
        plan.check_rows(self.cache, "k", k, plan.kv_shape)
        plan.check_rows(self.cache, "v", v, plan.kv_shape)
        if plan.num_tokens:
            self._store(k, v, plan)

    def _check(self, qkv: Tensor, rotation: QkNormRope, plan: AttentionPlan) -> None:
        cache, weight = self.cache, rotation.norm_weight
        plan.check_rows(cache, "qkv", qkv, plan.qkv_shape)
        plan.check_rows(cache, "cos", rotation.cos, plan.angle_shape)
        plan.check_rows(cache, "sin", rotation.sin, plan.angle_shape)
        if weight is not None:
            wide = torch.float32 if weight.dtype == torch.float32 else None  # see `rms_norm`
            plan.check_rows(cache, "norm_weight", weight, plan.norm_shape, wide)

    def _store(self, k: Tensor, v: Tensor, plan: AttentionPlan) -> None:
        scales, slots, pool = self.cache.scales, plan.slots, self._storage()
        if plan.spec.quantized:
            stored = (quantize(k, scales.k), quantize(v, scales.v))
            k, v = (tensor.view(torch.uint8) for tensor in stored)
        if pool.is_cuda:
            from dp_runtime.kernels.kv_append import append_rows

            append_rows(pool, slots.mapping, k, v)
            return
        pool[slots.pages, 0, :, slots.offsets] = k
        pool[slots.pages, 1, :, slots.offsets] = v

    def _storage(self) -> Tensor:
        """View a pool in e4m3 as bytes, which every device can scatter."""
        pool = self.cache.pool
        return pool.view(torch.uint8) if pool.dtype == E4M3 else pool
