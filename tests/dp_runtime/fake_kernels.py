"""Kernels in plain torch that know nothing but what a GPU kernel is given."""

from __future__ import annotations

import torch
from torch import Tensor

from dp_runtime.attention.spec import KvScales
from dp_runtime.attention.trtllm.kernel_groups import KernelGroup


class FakeKernels:
    """Reads requests from offsets, lengths, page table and mask of a group, as kernels do.

    It trusts them as kernels do, too: there is no check in here.
    """

    def prefill(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        starts, ends = group.cu_seqlens_q[:-1].tolist(), group.cu_seqlens_q[1:].tolist()
        kv_lens = group.cu_seqlens_kv.diff().tolist()
        for request, (start, end, kv_len) in enumerate(zip(starts, ends, kv_lens)):
            seen = torch.arange(kv_len) <= torch.arange(kv_len - (end - start), kv_len)[:, None]
            k, v = gather(pool, scales, group.page_table[request], kv_len)
            out[start:end] = attend(q[start:end], k, v, seen).to(out.dtype)

    def decode(
        self, q: Tensor, pool: Tensor, scales: KvScales, group: KernelGroup, out: Tensor
    ) -> None:
        length = group.query_len
        assert length is not None
        for request, kv_len in enumerate(group.seq_lens.tolist()):
            seen = torch.ones(length, kv_len, dtype=torch.bool)
            if group.mask is not None:
                seen[:, kv_len - length :] = unpack(group.mask[request], length)
            rows = slice(request * length, (request + 1) * length)
            k, v = gather(pool, scales, group.page_table[request], kv_len)
            out[rows] = attend(q[rows], k, v, seen).to(out.dtype)


def gather(pool: Tensor, scales: KvScales, pages: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """[kv_len, num_kv_heads, head_dim] of K and V."""
    kv = pool[pages.long()].float().permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :kv_len]
    return kv[0] * scales.k, kv[1] * scales.v


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [rows, num_heads, head_dim]; seen [rows, kv_len]."""
    group_size = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group_size, 1).transpose(0, 1) for x in (k, v))
    scores = q.float().transpose(0, 1) @ k.transpose(1, 2) * q.shape[2] ** -0.5
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def unpack(mask: Tensor, length: int) -> Tensor:
    """[rows, words] uint16 -> [rows, length] bool: bit j of a row is new token j."""
    words = mask.to(torch.int32)
    bits = torch.arange(16, dtype=torch.int32)
    return ((words[..., None] >> bits) & 1).bool().flatten(1)[:, :length]
