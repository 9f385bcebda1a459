"""The TRT-LLM attention kernels through flashinfer: FMHAv2 and XQA on SM90, trtllm-gen on SM100."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from flashinfer.decode import trtllm_batch_decode_with_kv_cache
from flashinfer.prefill import trtllm_batch_context_with_kv_cache, trtllm_fmha_v2_prefill
from torch import Tensor

from dp_runtime.attention.contract import LayerContract
from dp_runtime.attention.kernel_groups import KernelGroup, KernelPlanner
from dp_runtime.attention.paged import append
from dp_runtime.metadata import AttentionMetadata

WORKSPACE_BYTES = 128 << 20


class Kernels(Protocol):
    """One GPU generation's calls; each writes out [rows, num_heads, head_dim]."""

    def prefill(self, q: Tensor, pool: Tensor, group: KernelGroup, out: Tensor) -> None:
        """Any query lengths, causal."""

    def decode(self, q: Tensor, pool: Tensor, group: KernelGroup, out: Tensor) -> None:
        """The same short query length for all requests, causal among the new tokens."""


class Sm90Kernels:
    """FMHAv2 for prefill, XQA for decode and verification.

    NOTE: their workspaces are apart, for XQA's must be zero where its semaphores are.
    """

    def __init__(self, scale: float, device: torch.device) -> None:
        self._scale = scale
        self._fmha = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._xqa = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def prefill(self, q: Tensor, pool: Tensor, group: KernelGroup, out: Tensor) -> None:
        trtllm_fmha_v2_prefill(
            (q, pool),
            "Q_PAGED_KV_HND",
            workspace_buffer=self._fmha,
            seq_lens=group.seq_lens,
            max_q_len=group.max_query_len,
            max_kv_len=group.max_seq_len,
            bmm1_scale=self._scale,
            bmm2_scale=1.0,
            batch_size=group.batch_size,
            cum_seq_lens_q=group.cu_seqlens_q,
            cum_seq_lens_kv=group.cu_seqlens_kv,
            block_tables=group.page_table,
            out=out,
            mask_mode="causal",
        )

    def decode(self, q: Tensor, pool: Tensor, group: KernelGroup, out: Tensor) -> None:
        length = group.query_len
        assert length is not None, "a decode group has one query length"
        shaped = out if length == 1 else out.view(group.batch_size, length, *out.shape[1:])
        trtllm_batch_decode_with_kv_cache(
            query=q,
            kv_cache=pool,
            workspace_buffer=self._xqa,
            block_tables=group.page_table,
            seq_lens=group.seq_lens,
            max_seq_len=group.max_seq_len,
            bmm1_scale=self._scale,
            bmm2_scale=1.0,
            out=shaped,
            kv_layout="HND",
            backend="xqa",
            q_len_per_req=length,
            mask=group.mask,
        )


class Sm100Kernels:
    """trtllm-gen for both; written against flashinfer's signatures, not run by us."""

    def __init__(self, scale: float, device: torch.device) -> None:
        self._scale = scale
        self._workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)

    def prefill(self, q: Tensor, pool: Tensor, group: KernelGroup, out: Tensor) -> None:
        trtllm_batch_context_with_kv_cache(
            query=q,
            kv_cache=pool,
            workspace_buffer=self._workspace,
            block_tables=group.page_table,
            seq_lens=group.seq_lens,
            max_q_len=group.max_query_len,
            max_kv_len=group.max_seq_len,
            bmm1_scale=self._scale,
            bmm2_scale=1.0,
            batch_size=group.batch_size,
            cum_seq_lens_q=group.cu_seqlens_q,
            cum_seq_lens_kv=group.cu_seqlens_kv,
            out=out,
            kv_layout="HND",
        )

    def decode(self, q: Tensor, pool: Tensor, group: KernelGroup, out: Tensor) -> None:
        trtllm_batch_decode_with_kv_cache(
            query=q,
            kv_cache=pool,
            workspace_buffer=self._workspace,
            block_tables=group.page_table,
            seq_lens=group.seq_lens,
            max_seq_len=group.max_seq_len,
            bmm1_scale=self._scale,
            bmm2_scale=1.0,
            out=out,
            kv_layout="HND",
            backend="trtllm-gen",
            q_len_per_req=group.query_len,
        )


@dataclass(frozen=True, eq=False)
class TrtllmAttention:
    """Causal GQA over one layer's pool [num_pages, 2, num_kv_heads, page_size, head_dim]."""

    pool: Tensor
    contract: LayerContract
    planner: KernelPlanner
    kernels: Kernels

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        self.contract.check(q, k, v, metadata)
        out = torch.empty_like(q)
        if metadata.num_tokens == 0:
            return out
        append(self.pool, k, v, metadata)
        for group in self.planner.plan(metadata):
            rows = q[group.rows].contiguous()
            self._check(rows, group, metadata)
            target = out[group.rows] if isinstance(group.rows, slice) else torch.empty_like(rows)
            kernel = self.kernels.prefill if group.query_len is None else self.kernels.decode
            kernel(rows, self.pool, group, target)
            if not isinstance(group.rows, slice):
                out[group.rows] = target
        return out

    def _check(self, rows: Tensor, group: KernelGroup, metadata: AttentionMetadata) -> None:
        """The kernel takes the batch from q and compares it with nothing."""
        due = group.num_rows
        if group.query_len is not None:
            due = group.batch_size * group.query_len
        expected = (
            ("rows of a kernel's q", rows.shape[0], due),
            ("rows of a kernel's page_table", group.page_table.shape[0], group.batch_size),
            ("rows of a kernel's cu_seqlens_q", group.cu_seqlens_q.shape[0], group.batch_size + 1),
            ("rows of a kernel's mask", len(group.mask) if group.mask is not None else None,
             group.batch_size if group.mask is not None else None),
        )  # fmt: skip
        for what, found, number in expected:
            self.contract.same(what, found, number, metadata)


def make_kernels(head_dim: int, device: torch.device) -> Kernels:
    """The calls for a device's generation; ValueError for one that has none."""
    scale = head_dim**-0.5
    match torch.cuda.get_device_capability(device)[0]:
        case 9:
            return Sm90Kernels(scale, device)
        case 10:
            return Sm100Kernels(scale, device)
        case major:
            raise ValueError(
                f"attention_backend: 'trtllm' is not allowed; it needs compute capability 9 or 10 "
                f"and the device has {major}; use flashinfer or torch_ref"
            )
