"""The TRT-LLM kernels of SM90: FMHAv2 for prefill, XQA for decode and verification.

FMHAv2 in float16 accumulates in float16 too (csrc/fmha_v2_run.cu); in bfloat16 and e4m3 in float32.
"""

from __future__ import annotations

from functools import partial

import torch
from flashinfer.decode import trtllm_batch_decode_with_kv_cache
from flashinfer.prefill import get_trtllm_fmha_v2_module, trtllm_fmha_v2_prefill
from flashinfer.xqa import get_xqa_module
from torch import Tensor

from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.trtllm.backend import WORKSPACE_BYTES
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup
from dp_runtime.core.e4m3 import E4M3
from dp_runtime.kernels.jit_build import JitModule

LAYOUT = "Q_PAGED_KV_HND"


class Sm90Calls:
    """Calls over a workspace each: XQA's must be zero where its semaphores are."""

    def __init__(self, scale: float, device: torch.device) -> None:
        self._scale = scale
        self._fmha = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._xqa = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def prefill(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        trtllm_fmha_v2_prefill(
            (q, pool),
            LAYOUT,
            workspace_buffer=self._fmha,
            seq_lens=group.seq_lens,
            max_q_len=group.max_query_len,
            max_kv_len=group.max_seq_len,
            bmm1_scale=self._scale * scales.k,
            bmm2_scale=scales.v,
            batch_size=group.batch_size,
            cum_seq_lens_q=group.cu_seqlens_q,
            cum_seq_lens_kv=group.cu_seqlens_kv,
            block_tables=group.page_table,
            out=out,
            mask_mode="causal",
        )

    def decode(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        length = group.query_len
        assert length is not None, "a decode group has one query length"
        # NOTE: the e4m3 kernel waits for its predecessor only when it comes to the newest key: too
        # late for the others, if several are new.
        late = length > 1 and pool.dtype == E4M3
        shaped = out if length == 1 else out.view(group.batch_size, length, *out.shape[1:])
        trtllm_batch_decode_with_kv_cache(
            query=q,
            kv_cache=pool,
            workspace_buffer=self._xqa,
            block_tables=group.page_table,
            seq_lens=group.seq_lens,
            max_seq_len=group.max_seq_len,
            bmm1_scale=self._scale * scales.k,
            bmm2_scale=scales.v,
            out=shaped,
            kv_layout="HND",
            backend="xqa",
            q_len_per_req=length,
            mask=group.mask,
            enable_pdl=False if late else None,
        )


def make_calls(spec: AttentionSpec, device: torch.device) -> Sm90Calls:
    return Sm90Calls(spec.head_dim**-0.5, device)


def jit_modules(spec: AttentionSpec) -> tuple[JitModule, ...]:
    """List what flashinfer's own cached functions load, so that calls find it loaded."""
    out_dtype = spec.dtype if spec.quantized else None
    prefill = partial(get_trtllm_fmha_v2_module, LAYOUT, spec.kv_dtype, out_dtype)
    shape = f"page {spec.page_size}, head_dim {spec.head_dim}, {spec.group_size} to 1"
    return (
        JitModule(f"FMHAv2 ({spec.dtypes})", prefill),
        *(JitModule(f"XQA ({spec.dtypes}, {shape}, q_len {n})", partial(load_xqa, spec, n))
          for n in sorted(spec.decode_query_lens)),
    )  # fmt: skip


def load_xqa(spec: AttentionSpec, query_len: int) -> object:
    module: object = get_xqa_module(
        spec.dtype, spec.kv_dtype, spec.page_size, spec.head_dim, spec.group_size,
        False, spec.dtype, query_len,
    )  # fmt: skip
    return module
