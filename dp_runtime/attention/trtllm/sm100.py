"""trtllm-gen on SM100 and SM103; written against flashinfer's signatures, not run by us."""

from __future__ import annotations

import torch
from flashinfer.decode import get_trtllm_gen_fmha_module as load_decode
from flashinfer.decode import trtllm_batch_decode_with_kv_cache
from flashinfer.prefill import get_trtllm_gen_fmha_module as load_prefill
from flashinfer.prefill import trtllm_batch_context_with_kv_cache
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm.backend import WORKSPACE_BYTES
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup
from dp_runtime.kernels.jit_build import JitModule


class Sm100Calls:
    def __init__(self, scale: float, device: torch.device) -> None:
        self._scale = scale
        self._context = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._decode = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def prefill(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        trtllm_batch_context_with_kv_cache(
            query=q,
            kv_cache=pool,
            workspace_buffer=self._context,
            block_tables=group.page_table,
            seq_lens=group.seq_lens,
            max_q_len=group.max_query_len,
            max_kv_len=group.max_seq_len,
            bmm1_scale=self._scale * scales.k,
            bmm2_scale=scales.v,
            batch_size=group.batch_size,
            cum_seq_lens_q=group.cu_seqlens_q,
            cum_seq_lens_kv=group.cu_seqlens_kv,
            out=out,
            kv_layout="HND",
        )

    def decode(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        trtllm_batch_decode_with_kv_cache(
            query=q,
            kv_cache=pool,
            workspace_buffer=self._decode,
            block_tables=group.page_table,
            seq_lens=group.seq_lens,
            max_seq_len=group.max_seq_len,
            bmm1_scale=self._scale * scales.k,
            bmm2_scale=scales.v,
            out=out,
            kv_layout="HND",
            backend="trtllm-gen",
            q_len_per_req=group.query_len,
        )


def make_calls(spec: AttentionSpec, device: torch.device) -> Sm100Calls:
    return Sm100Calls(spec.head_dim**-0.5, device)


def jit_modules(spec: AttentionSpec) -> tuple[JitModule, ...]:
    """Return one launcher; the kernels themselves come precompiled with flashinfer."""
    return (JitModule("trtllm-gen", lambda: (load_decode(), load_prefill())),)
