"""Attention calls over random caches, and what the float32 reference says about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dp_runtime.attention.kv_writer import KvWriter
from dp_runtime.attention.registry import backend_class
from dp_runtime.attention.spec import AttentionSpec, KvScales
from dp_runtime.attention.torch_ref import TorchRefBackend
from dp_runtime.core.attention_metadata import AttentionMetadata, PageGeometry, Place
from dp_runtime.core.batch import LocalBatch
from dp_runtime.core.e4m3 import quantize
from dp_runtime.core.qk_norm_rope import QkNormRope, rotate
from dp_runtime.layers.norm import RMSNorm
from tests.dp_runtime.paged import attend, paged_batch, random_page_table

CUDA = torch.device("cuda", 0)
PLACE = Place(0, 3, "target")
SCALES = KvScales(k=0.02, v=0.05)  # of quantised caches
EDGES = (1, 2, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1000, 1023, 1024, 1025, 2047, 2048, 2049,
         4095, 4096, 4097, 8191, 8192)  # fmt: skip

Lengths = Sequence[tuple[int, int]]  # (query_len, seq_len) of each request


def lengths_of(batch: int, query_len: int, longest: int = 8192) -> Lengths:
    """Sequence lengths with page boundaries and their neighbours, up to `longest`."""
    fitting = [edge for edge in EDGES if query_len <= edge <= longest]
    return [(query_len, fitting[i % len(fitting)]) for i in range(batch)]


def whole_lengths(batch: int, longest: int = 8192) -> Lengths:
    """Prompts of such lengths that are prefilled in one step."""
    return [(seq_len, seq_len) for _, seq_len in lengths_of(batch, 1, longest)]


def relative_error(found: Tensor, due: Tensor) -> float:
    return float((found.float() - due).norm() / due.norm())


@dataclass(frozen=True, eq=False)
class Case:
    """A call, and the pool before it."""

    spec: AttentionSpec
    batch: LocalBatch
    num_pages: int
    pool: Tensor
    scales: KvScales
    q: Tensor
    k: Tensor
    v: Tensor

    @classmethod
    def make(cls, lengths: Lengths, spec: AttentionSpec) -> Case:
        table, num_pages = random_page_table(
            [s for _, s in lengths], spec.page_size, np.random.default_rng(len(lengths))
        )
        batch = paged_batch(lengths, table, spec.page_size)
        generator = torch.Generator(CUDA).manual_seed(0)

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=spec.dtype, device=CUDA, generator=generator)

        heads, dim = spec.num_kv_heads, spec.head_dim
        pool = randn(num_pages, 2, heads, spec.page_size, dim)
        pool[0] = 0
        if spec.quantized:
            pool = torch.stack(
                [quantize(half, s) for half, s in zip(pool.unbind(1), (SCALES.k, SCALES.v))], 1
            )
        rows = batch.num_tokens
        q, k, v = randn(rows, spec.num_heads, dim), randn(rows, heads, dim), randn(rows, heads, dim)
        scales = SCALES if spec.quantized else KvScales()
        return cls(spec, batch, num_pages, pool, scales, q, k, v)

    @property
    def metadata(self) -> AttentionMetadata:
        pages = PageGeometry(self.num_pages, self.spec.page_size)
        return AttentionMetadata.build(self.batch, pages, PLACE, CUDA)

    def run(self, name: str, metadata: AttentionMetadata | None = None) -> Tensor:
        pools, scales = [self.pool.clone()], [self.scales]
        backend = backend_class(name)(self.spec, pools, scales)
        return attend(backend, self.q, self.k, self.v, metadata or self.metadata)

    def run_unrotated(self, name: str, rotation: QkNormRope) -> tuple[Tensor, Tensor]:
        """With q, k and v in one, still to be normed and rotated: what comes out, and the pool."""
        pool = self.pool.clone()
        backend = backend_class(name)(self.spec, [pool], [self.scales])
        plan, paged = backend.plan(self.metadata), backend.layer(0)
        qkv = torch.cat([self.q, self.k, self.v], 1)
        return paged.run(KvWriter(paged.cache).write(qkv, rotation, plan), plan), pool

    def rotated(self, rotation: QkNormRope) -> Case:
        """The same by the plain layers, its q and k normed and rotated."""
        qk, weight = torch.cat([self.q, self.k], 1), rotation.norm_weight
        qk = qk if weight is None else RMSNorm(weight, rotation.eps)(qk)
        q, k = rotate(qk, (rotation.cos, rotation.sin)).tensor_split([self.spec.num_heads], 1)
        return replace(self, q=q.contiguous(), k=k.contiguous())

    def reference(self) -> Tensor:
        """In float32, over what the cache holds: its values times their scales."""
        spec = replace(self.spec, dtype=torch.float32, kv_dtype=torch.float32)
        pool, k, v = self.pool.float(), self.k.float(), self.v.float()
        if self.spec.quantized:
            pool = pool * torch.tensor([self.scales.k, self.scales.v], device=CUDA).view(2, 1, 1, 1)
            k = quantize(k, self.scales.k).float() * self.scales.k
            v = quantize(v, self.scales.v).float() * self.scales.v
        backend = TorchRefBackend(spec, [pool])
        return attend(backend, self.q.float(), k, v, self.metadata)


def with_null_rows(case: Case, count: int, query_len: int) -> tuple[Case, AttentionMetadata]:
    """The case with null requests behind its own, as a graph has them; finite rows.

    A null request: query_len as the graph's, seq_len the same, its page table all page 0.
    """
    metadata, size = case.metadata, case.spec.page_size
    lens = np.full(count, query_len, np.int32)
    table = metadata.page_table_host
    width = max(table.shape[1], 1)
    old = np.zeros((len(table), width), np.int32)
    old[:, : table.shape[1]] = table
    host_table = np.concatenate([old, np.zeros((count, width), np.int32)])
    query_lens = np.concatenate([metadata.query_lens_host, lens])
    seq_lens = np.concatenate([metadata.seq_lens_host, lens])
    slots = torch.arange(query_len, device=CUDA, dtype=torch.int32).repeat(count)  # of page 0
    assert query_len <= size, "null rows fit into page 0"
    cu = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    padded = replace(
        metadata,
        cu_seqlens_q=torch.from_numpy(cu).to(CUDA),
        seq_lens=torch.from_numpy(seq_lens).to(CUDA),
        page_table=torch.from_numpy(host_table).to(CUDA),
        slot_mapping=torch.cat([metadata.slot_mapping, slots]),
        query_lens_host=query_lens,
        seq_lens_host=seq_lens,
        page_table_host=host_table,
    )
    more = [torch.randn_like(x[:1].expand(count * query_len, -1, -1)) if len(x) else
            torch.randn((count * query_len, *x.shape[1:]), dtype=x.dtype, device=CUDA)
            for x in (case.q, case.k, case.v)]  # fmt: skip
    q, k, v = (torch.cat([x, y]) for x, y in zip((case.q, case.k, case.v), more))
    return replace(case, q=q, k=k, v=v), padded


def with_poisoned_tails(case: Case, extra: int) -> tuple[Case, AttentionMetadata]:
    """The same call on views whose allocations go on with what must never be read."""

    def poisoned(x: Tensor, poison: float) -> Tensor:
        tail = torch.full((extra, *x.shape[1:]), poison, dtype=x.dtype, device=CUDA)
        return torch.cat([x, tail])[: len(x)]

    metadata = case.metadata
    huge = 2_000_000_000
    tailed = replace(
        metadata,
        cu_seqlens_q=poisoned(metadata.cu_seqlens_q, huge),
        seq_lens=poisoned(metadata.seq_lens, huge),
        page_table=poisoned(metadata.page_table, huge),
        slot_mapping=poisoned(metadata.slot_mapping, huge),
    )
    q, k, v = (poisoned(x, float("nan")) for x in (case.q, case.k, case.v))
    return replace(case, q=q, k=k, v=v), tailed
